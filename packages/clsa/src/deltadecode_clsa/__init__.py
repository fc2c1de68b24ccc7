"""The weights of deltadecode's small CLSA model, and nothing else."""

from pathlib import Path

__version__ = "0.1.0"


def model_path() -> Path:
    """Directory with the model's configuration, weights and tokenizer, as Transformers loads it."""
    return Path(__file__).resolve().parent / "model"
