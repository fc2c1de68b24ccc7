"""One attention function in the place of another, for as long as something is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from deltadecode.architecture import text_config

State = TypeVar("State")


@contextmanager
def attending(model: Any, name: str, states: dict[int, State], state: State) -> Iterator[State]:
    """While it lasts, a model attends by a function that finds a state under its configuration.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its attention implementation is set, and set back.
    name : str
        Of a function that is registered with Transformers' interface.
    states : dict
        Where that function looks, by the identity of the text decoder's configuration.
    state
        What it finds there.

    Yields
    ------
    object
        ``state``.
    """
    key, previous = id(text_config(model)), model.config._attn_implementation
    states[key] = state
    try:
        model.set_attn_implementation(name)
        yield state
    finally:
        model.set_attn_implementation(previous)
        del states[key]
