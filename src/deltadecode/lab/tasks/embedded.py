"""Where the embedded model lies: in a distribution of its own, ``deltadecode-embedded``."""

from __future__ import annotations

from pathlib import Path

from deltadecode.models.shipped import shipped_model


def model_path() -> Path:
    """Directory of the embedded model, a 24-layer Llama of 14 million parameters in bfloat16.

    ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load it. It was
    trained on chain problems only. Raises DeltaDecodeError when the distribution
    ``deltadecode-embedded`` is not installed.
    """
    return shipped_model("embedded", "embedded", "demo")
