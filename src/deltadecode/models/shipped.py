"""Where the small trained CLSA model lies: in a distribution of its own, ``deltadecode-clsa``.

Not beside CLSA's classes: the command line asks for it, and their import takes seconds.
"""

from __future__ import annotations

from pathlib import Path

from deltadecode.errors import DeltaDecodeError


def model_path() -> Path:
    """Directory of a CLSA model of 16 layers and 14.6 million parameters in bfloat16.

    ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load it. It was
    trained on chain problems, needles and Python's library. Raises DeltaDecodeError when the
    distribution ``deltadecode-clsa`` is not installed.
    """
    try:
        import deltadecode_clsa
    except ModuleNotFoundError:
        raise DeltaDecodeError(
            "the CLSA model is not installed; pip install 'deltadecode[clsa]' brings it, and in a "
            "clone of the repository pip install ./packages/clsa"
        ) from None
    return Path(deltadecode_clsa.model_path())
