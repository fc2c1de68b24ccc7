"""A cache of fixed size: a prefix that stays, and slots that every pass writes anew."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from deltadecode.architecture import num_layers, text_config


class RowsLayer(DynamicLayer):
    """Keys and values of one layer: ``context`` tokens, then those of the last pass.

    The first update writes the prefix, every later one the slots behind it. A sliding-window layer
    keeps everything, too: its mask says what its queries see.
    """

    # Set by the first states; nothing below reads them before.
    keys: Tensor
    values: Tensor

    def __init__(self, context: int, rows: int) -> None:
        super().__init__()
        self.context, self.size, self.held = context, context + rows, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers, [1, Hkv, context + rows, D]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_empty((*states.shape[:2], self.size, states.shape[3]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens [1, Hkv, n, D] behind the prefix; gives all up to the last of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.held + key_states.shape[2]
        self.keys[:, :, self.held : end] = key_states
        self.values[:, :, self.held : end] = value_states
        self.held = self.context
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens before those of a pass."""
        return self.held


def rows_cache(config: Any, context: int, rows: int) -> Cache:
    """A cache for one text of a model."""
    layers: list[Any] = [RowsLayer(context, rows) for _ in range(num_layers(text_config(config)))]
    return Cache(layers=layers)


def foreign_state(config: Any) -> str | None:
    """What a model keeps besides keys and values of tokens, as the class that holds it."""
    # Dummies stand for layers that reuse the keys and values of others.
    known = (DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__, "DummyLayer")
    names = (type(layer).__name__ for layer in DynamicCache(config=text_config(config)).layers)
    return next((name for name in names if name not in known), None)
