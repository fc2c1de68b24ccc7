"""Models, tokenizers and plans from what was typed; every mistake is one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from deltadecode.architecture import attention_layers, config_hash, num_layers, text_config
from deltadecode.cli.options import CLSA, EMBEDDED, SMOLLM2
from deltadecode.cli.output import BadInput, note, one_line, quiet_libraries, stderr
from deltadecode.config import DeltaConfig
from deltadecode.errors import DeltaConfigError
from deltadecode.plan_files import load_meta

if TYPE_CHECKING:
    import torch

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_Loaded = TypeVar("_Loaded")


def _embedded() -> Path:
    from deltadecode.lab.tasks import model_path

    return model_path()


def _smollm2() -> Path:
    from deltadecode.lab.smollm2 import SMOLLM2

    # On the terminal itself: what goes to sys.stderr meanwhile is the libraries' and is dropped.
    status = Console(file=sys.stderr).status("unpacking, half a minute")

    def on_unpack(line: str) -> None:
        note(line)
        quiet_libraries()
        status.start()

    try:
        return SMOLLM2.folder(on_unpack)
    finally:
        status.stop()


def _clsa() -> Path:
    from deltadecode.models.shipped import model_path

    return model_path()


# Names that stand for a folder, and what finds it. A further name is one row.
NAMED_MODELS: dict[str, Callable[[], Path]] = {
    EMBEDDED: _embedded, SMOLLM2: _smollm2, CLSA: _clsa
}  # fmt: skip


def named_folder(model: str) -> str:
    """Folder that a name of :data:`NAMED_MODELS` stands for; anything else is given back."""
    find = NAMED_MODELS.get(model)
    return model if find is None else str(find())


def resolve_model(model: str) -> str:
    """Folder or hub name that Transformers loads, from a model argument.

    Refuses what can be no model, before anything is imported for it.
    """
    if model in NAMED_MODELS:
        return named_folder(model)
    path = Path(model)
    try:
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise BadInput(f"{model!r} is not a model folder: it has no config.json")
        elif path.exists():
            raise BadInput(f"{model!r} is not a folder; a model is a folder with a config.json")
        elif not _HUB_NAME.fullmatch(model) or path.parent.exists():
            raise BadInput(f"model path {model!r} does not exist")
    except OSError as error:
        raise BadInput(f"cannot read model path {model!r}: {error.strerror}") from error
    return model


def load_config(model: str) -> Any:
    """Load the configuration of a model, and nothing else of it."""
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
    """Load the tokenizer of a model."""
    from transformers import AutoTokenizer

    return _loaded("tokenizer", model, lambda: AutoTokenizer.from_pretrained(model))


def load_model(model: str, dtype: str, device: torch.device) -> Any:
    """Load a model with stock attention, in evaluation mode; dtype ``"auto"``: the checkpoint's."""
    from transformers import AutoModelForCausalLM

    with stderr().status(f"loading {Path(model).name}"):
        loaded = _loaded(
            "weights", model, lambda: AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        )
        return loaded.eval().to(device)


def find_device(name: str) -> torch.device:
    """Device of a name as PyTorch writes it; ``"auto"``: the first GPU, else the CPU."""
    import torch

    from deltadecode.lab.collect_env import devices

    available = devices()
    if name == "auto":
        return torch.device(available[1] if len(available) > 1 else "cpu")
    if name not in (*available, "cuda" if "cuda:0" in available else "cpu"):
        raise BadInput(f"--device must be one of {', '.join(available)} here, got {name!r}")
    return torch.device(name)


def make_plan(config: Any, plan_file: Path | None, fields: dict[str, Any]) -> DeltaConfig:
    """Configuration for a model: a file's or the model's own, with what was typed in its place.

    Of the fields, None is one that was not typed. When there is no valid plan, the errors are
    DeltaConfigError and UnsupportedModelError.
    """
    layers = attention_layers(config)
    base = DeltaConfig.for_model(config) if plan_file is None else DeltaConfig.load(plan_file)
    cfg = replace(base, **{name: value for name, value in fields.items() if value is not None})
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
