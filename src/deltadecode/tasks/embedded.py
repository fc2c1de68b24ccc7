"""Where the embedded model lies."""

from __future__ import annotations

from pathlib import Path


def model_path() -> Path:
    """Directory of the embedded model.

    ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load it: a
    24-layer Llama of 14 million parameters in bfloat16, trained on chain problems only.
    """
    return Path(__file__).resolve().parent / "model"
