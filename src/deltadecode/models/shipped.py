"""Where the small trained models lie: each in a distribution of its own.

Not beside CLSA's classes: the command line asks for it, and their import takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from deltadecode.errors import DeltaDecodeError


def model_path() -> Path:
    """Directory of a CLSA model of 16 layers and 14.6 million parameters in bfloat16.

    ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load it. It was
    trained on chain problems, needles and Python sources. Raises DeltaDecodeError when the
    distribution ``deltadecode-clsa`` is not installed.
    """
    return shipped_model("clsa", "CLSA", "clsa")


def shipped_model(name: str, title: str, extra: str) -> Path:
    """Directory of the model in the distribution ``deltadecode-NAME``, which an extra brings.

    Raises
    ------
    DeltaDecodeError
        Where it is not installed; with the ``title`` of the model, and how to get it.
    """
    try:
        module = import_module(f"deltadecode_{name}")
    except ModuleNotFoundError:
        raise DeltaDecodeError(
            f"the {title} model is not installed; pip install 'deltadecode[{extra}]' brings it, "
            f"and in a clone of the repository pip install ./packages/{name}"
        ) from None
    return Path(module.model_path())
