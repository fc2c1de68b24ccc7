"""What both servers load: a shape without weights, and a tokenizer of plain words."""

import json
from pathlib import Path
from typing import Any

from benchmarks.e2e.shapes import ModelShape


def write_tokenizer(shape: ModelShape, folder: Path) -> Path:
    """Write a tokenizer, to a folder of its own.

    Each token is a word of five letters and nothing stands between words. So a prompt of N random
    tokens is read back as exactly N, and every token that random weights choose can be written.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    words = {f"{number:05x}": number for number in range(shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="00000"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(".{5}"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    # Transformers makes Qwen's own tokenizer of any that has Qwen's configuration beside it.
    _write(folder / "config.json", {"model_type": "gpt_neox"})
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape.positions}
    _write(folder / "tokenizer_config.json", settings)
    return folder


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")
