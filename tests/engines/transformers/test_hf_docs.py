"""The code of docs/transformers.md runs as it stands there, block after block."""

import re
import string
from pathlib import Path

from hf_tiny import VOCAB, make_model
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

PAGE = Path(__file__).parents[3] / "docs" / "transformers.md"


def test_all_blocks_run_pasted_in_order(tmp_path: Path) -> None:
    letters = string.ascii_letters + string.digits
    spelling = Tokenizer(models.BPE({letters[i]: i for i in range(VOCAB)}, merges=[]))
    spelling.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=spelling).save_pretrained(tmp_path)
    make_model("llama", "sdpa", num_hidden_layers=24).save_pretrained(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) > 4
    code = "\n".join(blocks)
    code = re.sub(r"max_new_tokens=\d+", "max_new_tokens=4", code)
    code = re.sub(r'path = ".*"', f"path = {str(tmp_path)!r}", code)
    exec(code, {})
