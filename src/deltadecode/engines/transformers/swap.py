"""Another attention for as long as something is looked at; what was set before comes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from transformers.modeling_utils import PreTrainedModel

from deltadecode.config import DeltaConfig
from deltadecode.engines.transformers.bind import (
    attach,
    bind,
    detach,
    find_decoder,
    find_hook,
    find_hooks,
    set_implementation,
)

State = TypeVar("State")


@contextmanager
def attending(model: Any, name: str, state: State) -> Iterator[State]:
    """While it lasts, a model attends by another function, whose planned modules carry a state.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its planned modules get the attribute ``name``.
    name : str
        Of a function that is registered with Transformers' interface.
    state
        What the function finds on the module.
    """
    decoder = find_decoder(model)
    with _kept_implementations(model):
        try:
            for module in decoder.planned.values():
                vars(module)[name] = state
            for config in decoder.configs:
                config._attn_implementation_internal = name
            yield state
        finally:
            for module in decoder.planned.values():
                vars(module).pop(name, None)


@contextmanager
def stock_attention(model: Any) -> Iterator[None]:
    """While it lasts, an enabled model attends as it did before it was enabled."""
    hook = find_hook(model)
    with _kept_implementations(model):
        set_implementation(model, hook.state.previous if hook and hook.state else None)
        yield


@contextmanager
def enabled(model: Any, cfg: DeltaConfig) -> Iterator[None]:
    """While it lasts, DELTA decodes with a plan of its own; an older plan and its counts stay."""
    before = [(part, hook) for part, _, hook in find_hooks(model)]
    with _kept_implementations(model):
        bind(model, cfg)
        try:
            yield
        finally:
            detach(model)
            for part, hook in before:
                if hook.state is None:
                    hook.install(part)
                else:
                    attach(model, find_decoder(model), hook.state)


@contextmanager
def _kept_implementations(model: PreTrainedModel) -> Iterator[None]:
    parts: list[Any] = [part for part in model.modules() if hasattr(part, "config")]
    configs = {id(part.config): part.config for part in parts}.values()
    kept = [(config, getattr(config, "_attn_implementation_internal", None)) for config in configs]
    try:
        yield
    finally:
        for config, name in kept:
            config._attn_implementation_internal = name
