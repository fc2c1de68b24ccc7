"""A KV cache of a fixed size, from which compiled decode steps and CUDA graphs can read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer

from deltadecode.architecture import attention_layers, num_layers, text_config
from deltadecode.engines.transformers.layers import one_dtype
from deltadecode.errors import ArgumentError, ArgumentTypeError, UnsupportedCacheError


class DeltaStaticLayer(StaticLayer):
    """Keys and values of one full-attention layer, in buffers that never move.

    It holds ``max_cache_len`` tokens, and can be read by pages of up to ``page_size``. With
    ``window`` it stands for a sliding-window layer, and the mask alone hides what lies behind.
    """

    # Set by the first states; None before, but nothing below reads them then.
    keys: Tensor
    values: Tensor

    def __init__(self, max_cache_len: int, page_size: int, window: bool = False) -> None:
        super().__init__(max_cache_len)
        self.is_sliding = window
        # A page that starts at the last token, wherever that is, ends inside the buffer.
        self.slots = (-(-max_cache_len // page_size) + 1) * page_size

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers [B, Hkv, slots, D].

        Parameters
        ----------
        key_states, value_states : Tensor
            [B, Hkv, tokens, D]; the tokens are not stored yet.
        """
        # The class allocates what it takes for the number of tokens.
        tokens, self.max_cache_len = self.max_cache_len, self.slots
        super().lazy_initialization(key_states, value_states)
        self.max_cache_len = tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store tokens and return the whole buffers.

        Parameters
        ----------
        key_states, value_states : Tensor
            [B, Hkv, new tokens, D].

        Returns
        -------
        tuple of Tensor
            Keys and values [B, Hkv, slots, D].
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        added = key_states.shape[2]
        place = torch.arange(added, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(added)
        # One token too many must fail as it does in the stock layer, not land in the spare slots.
        place = torch.where(place < self.max_cache_len, place, self.slots)
        self.keys.index_copy_(2, place, key_states)
        self.values.index_copy_(2, place, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Keys that a mask must cover, and the position of the first."""
        return self.slots, 0


class DeltaStaticCache(StaticCache):
    """The cache that ``attn_implementation="delta"`` decodes from in compiled steps.

    ``generate(..., cache_implementation="static")`` makes one by itself, and on a GPU then runs its
    decode steps from CUDA graphs. Full-attention layers are :class:`DeltaStaticLayer`; other layers
    keep the class that :class:`transformers.StaticCache` gives them.

    ``max_cache_len`` counts the tokens of each row, padding included. ``page_size`` is the largest
    of a plan that the cache can be decoded from; up to twice as many slots of a row stay empty.
    With ``lossless`` sliding-window layers hold every token: a ring of the last ones has lost what
    drafts that are taken back have overwritten.

    Raises
    ------
    ArgumentError
        When a size is below 1, or no int.
    UnsupportedCacheError
        When a planned layer keeps more than keys and values, or Transformers is too old.
    UnsupportedModelError
        When the model has no full-attention layer that could be planned.
    """

    def __init__(
        self, config: Any, max_cache_len: int, page_size: int = 64, *, lossless: bool = False
    ) -> None:
        for name, value in (("max_cache_len", max_cache_len), ("page_size", page_size)):
            if type(value) is not int:
                raise ArgumentTypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ArgumentError(f"{name} must be at least 1, got {value}")
        planned = attention_layers(config)
        super().__init__(config=config, max_cache_len=max_cache_len)
        self.room = max_cache_len  # a property of the class has the other name in some versions
        self.page_size = page_size
        # What lossless decoding has captured of passes from it.
        self.passes: Any = None
        self.num_layers = num_layers(text_config(config))
        while len(self.layers) < self.num_layers:  # as in DeltaCache
            self.layers.append(StaticLayer(max_cache_len))
        for layer in planned:
            stock = self.layers[layer]
            if type(stock).__name__ == "DummyLayer":  # the layer reads the keys of another
                continue
            # A window as long as the longest sequence counts as full attention, but comes as a
            # sliding-window layer.
            if type(stock) not in (StaticLayer, StaticSlidingWindowLayer):
                raise UnsupportedCacheError(
                    f"DELTA has no static cache for layer {layer}, which keeps a "
                    f"{type(stock).__name__}; use a DeltaCache"
                )
            if not hasattr(stock, "cumulative_length"):
                raise UnsupportedCacheError(
                    "DELTA's static cache needs static layers that know their length, got those "
                    f"of Transformers {transformers.__version__}; use a DeltaCache"
                )
            self.layers[layer] = DeltaStaticLayer(max_cache_len, page_size)
        for number, stock in enumerate(self.layers):
            if lossless and type(stock) is StaticSlidingWindowLayer:
                self.layers[number] = DeltaStaticLayer(max_cache_len, page_size, window=True)

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back."""
        return all(
            type(layer) in (DeltaStaticLayer, StaticLayer) or type(layer).__name__ == "DummyLayer"
            for layer in self.layers
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Take as many tokens of every row back as a number below 0 says.

        The buffers keep them until others are written in their place.
        """
        torch._foreach_add_(self.lengths, tokens_to_remove)

    def empty(self) -> None:
        """Take all tokens back."""
        torch._foreach_zero_(self.lengths)

    @property
    def lengths(self) -> list[Tensor]:
        """Tokens of each layer that holds some, int64 scalars."""
        held = static_layers(self.layers)
        return [layer.cumulative_length for layer in held if layer.is_initialized]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store tokens of one layer, in the dtype that it holds."""
        layer: Any = self.layers[layer_idx]
        if layer.is_initialized and layer.keys is not None:
            dtype = layer.keys.dtype
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        elif key_states.dtype != value_states.dtype:
            key_states, value_states = one_dtype(key_states, value_states)
        stored: tuple[Tensor, Tensor]
        stored = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return stored


def static_layers(layers: Iterable[Any]) -> list[Any]:
    """Those of a cache's layers that have buffers of a fixed size."""
    return [layer for layer in layers if isinstance(layer, StaticLayer)]


def replace_static(
    stock: StaticCache, config: Any, page_size: int, draft_tokens: int = 0
) -> DeltaStaticCache:
    """Make a cache of ours as large as a stock one that holds no tokens yet, and free that one.

    In lossless mode it has room for as many drafts besides.
    """
    # Sliding-window layers are shorter.
    tokens = max((getattr(layer, "max_cache_len", 0) for layer in stock.layers), default=0)
    lossless = draft_tokens > 0
    cache = DeltaStaticCache(config, tokens + draft_tokens, page_size, lossless=lossless)
    # The stock one has as many layers as an encoder, where a decoder stands alone.
    for ours, theirs in zip(cache.layers, stock.layers, strict=False):
        if not isinstance(theirs, StaticLayer) or not isinstance(ours, StaticLayer):
            continue
        if theirs.keys is not None and theirs.values is not None:
            keys, values = theirs.keys[:, :, :0].clone(), theirs.values[:, :, :0].clone()
            theirs.keys = theirs.values = None
            ours.lazy_initialization(keys, values)
    return cache
