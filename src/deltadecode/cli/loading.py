"""Models, tokenizers and plans from what was typed; every mistake is one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deltadecode.architecture import attention_layers, config_hash, num_layers, text_config
from deltadecode.cli.output import BadInput, note, one_line, stderr
from deltadecode.config import DeltaConfig, load_meta
from deltadecode.errors import DeltaConfigError

if TYPE_CHECKING:
    import torch

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_Loaded = TypeVar("_Loaded")


EMBEDDED = "embedded"
_DTYPES = ("float32", "bfloat16", "float16", "auto")


def model_folder(model: str) -> str:
    """Folder of a model: that of the package's own for ``embedded``, else what was typed.

    Parameters
    ----------
    model : str
        What was typed.

    Returns
    -------
    str
    """
    from deltadecode.lab.tasks import model_path

    return str(model_path()) if model == EMBEDDED else model


def checked_dtype(dtype: str) -> str:
    """Refuse a dtype that is none.

    Parameters
    ----------
    dtype : str
        What was typed.

    Returns
    -------
    str
        The same.

    Raises
    ------
    BadInput
        Naming those that are.
    """
    if dtype not in _DTYPES:
        raise BadInput(f"--dtype must be float32, bfloat16, float16 or auto, got {dtype!r}")
    return dtype


def check_model_path(model: str) -> None:
    """Refuse what can be no model, before anything is imported for it.

    Parameters
    ----------
    model : str
        Folder of a model, or its name on the Hugging Face hub.

    Raises
    ------
    BadInput
        Naming the path and what it lacks.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"{model!r} is not a model folder: it has no config.json")
    elif path.exists():
        raise BadInput(f"{model!r} is not a folder; a model is a folder with a config.json")
    elif not _HUB_NAME.fullmatch(model) or path.parent.exists():
        raise BadInput(f"model path {model!r} does not exist")


def load_config(model: str) -> Any:
    """Load the configuration of a model, and nothing else of it.

    Parameters
    ----------
    model : str
        See :func:`check_model_path`.

    Returns
    -------
    transformers.PreTrainedConfig

    Raises
    ------
    BadInput
        When there is no such model, or its configuration is not one.
    """
    check_model_path(model)
    from transformers import AutoConfig

    if Path(model).exists():
        return _loaded("configuration", model, lambda: AutoConfig.from_pretrained(model))
    try:
        with stderr().status(f"looking for {model} on the hub"):
            return AutoConfig.from_pretrained(model)
    except Exception as error:
        raise BadInput(
            f"model path {model!r} does not exist, and no model of that name could be fetched: "
            f"{one_line(error)}"
        ) from error


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer of a model.

    Parameters
    ----------
    model : str
        See :func:`check_model_path`.

    Returns
    -------
    transformers.PreTrainedTokenizerBase

    Raises
    ------
    BadInput
        When it has none that loads.
    """
    from transformers import AutoTokenizer

    return _loaded("tokenizer", model, lambda: AutoTokenizer.from_pretrained(model))


def load_model(model: str, dtype: str, device: torch.device) -> Any:
    """Load a model with stock attention.

    Parameters
    ----------
    model : str
        See :func:`check_model_path`.
    dtype : str
        Name of a dtype, or ``"auto"``: that of the checkpoint.
    device : torch.device
        Where to put it.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode.

    Raises
    ------
    BadInput
        When its weights do not load.
    """
    from transformers import AutoModelForCausalLM

    loaded = _loaded(
        "weights", model, lambda: AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    )
    return loaded.eval().to(device)


def find_device(name: str) -> torch.device:
    """Device of a name.

    Parameters
    ----------
    name : str
        As PyTorch names it, or ``"auto"``: the first GPU, else the CPU.

    Returns
    -------
    torch.device

    Raises
    ------
    BadInput
        When there is no such device here, naming those that are.
    """
    import torch

    from deltadecode.lab.collect_env import devices

    found = devices()
    if name == "auto":
        return torch.device(found[1] if len(found) > 1 else "cpu")
    if name not in (*found, "cuda" if "cuda:0" in found else "cpu"):
        raise BadInput(f"--device must be one of {', '.join(found)} here, got {name!r}")
    return torch.device(name)


def parse_layers(option: str, value: str | None) -> tuple[int, ...] | None:
    """Layer numbers from ``"2,14,22"``.

    Parameters
    ----------
    option : str
        Name of the option, for the message.
    value : str or None
        What was typed; empty: no layer.

    Returns
    -------
    tuple of int or None
        None when nothing was typed.

    Raises
    ------
    BadInput
        Naming the value.
    """
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")] if value.strip() else []
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise BadInput(f"{option} must be layer numbers with commas between, got {value!r}")
    return tuple(int(part) for part in parts)


def make_plan(config: Any, plan_file: Path | None, given: dict[str, Any]) -> DeltaConfig:
    """Configuration for a model: a file's or the model's own, with what was typed in its place.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Configuration of the model.
    plan_file : Path or None
        File that :meth:`DeltaConfig.load` reads.
    given : dict
        Fields of the configuration; None: not typed.

    Returns
    -------
    DeltaConfig
        Valid for this model.

    Raises
    ------
    DeltaConfigError, UnsupportedModelError
        When there is no valid plan.
    """
    layers = attention_layers(config)
    base = DeltaConfig.for_model(config) if plan_file is None else DeltaConfig.load(plan_file)
    cfg = replace(base, **{name: value for name, value in given.items() if value is not None})
    foreign = None if plan_file is None else _foreign(plan_file, config)
    try:
        cfg.layer_plan(num_layers(text_config(config)), layers)
    except DeltaConfigError as error:
        raise DeltaConfigError(f"{foreign}: {error}" if foreign else str(error)) from error
    if foreign:
        note(f"warning: {foreign}")
    return cfg


def _foreign(plan_file: Path, config: Any) -> str | None:
    """What to say of a plan that was calibrated for a model of another shape; None: nothing."""
    meta = load_meta(plan_file)
    made_for, here = meta.get("config_hash"), config_hash(config)
    if made_for is None or made_for == here:
        return None
    return (
        f"plan {str(plan_file)!r} was calibrated for {meta.get('model')} (config hash {made_for}), "
        f"and this model's hash is {here}"
    )


def _loaded(what: str, model: str, load: Callable[[], _Loaded]) -> _Loaded:
    # The libraries raise many kinds of errors for a broken file: all mean that this is no model.
    try:
        return load()
    except Exception as error:
        raise BadInput(f"cannot load the {what} of {model!r}: {one_line(error)}") from error
