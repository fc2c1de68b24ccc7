"""What both servers load: a shape without weights, and a tokenizer of plain words."""

import json
from pathlib import Path

from benchmarks.e2e.shapes import ModelShape


def write_tokenizer(shape: ModelShape, folder: Path) -> Path:
    """Write a tokenizer, to a folder without a model's configuration.

    Each token is a word, so that a prompt of N random tokens is read back as exactly N, and every
    token that random weights choose can be written. Beside a configuration, Transformers would make
    the model's own tokenizer of it.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    words = {f"{number:x}": number for number in range(shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.positions,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")
    return folder
