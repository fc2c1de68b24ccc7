"""What a CLSA model keeps of the tokens that it has read.

The self-decoder keeps a window for each of its layers, whatever the context. All layers of the
cross-decoder share one layer of keys and values, and one of index keys: 2 · Hkv · D and the index's
head size numbers a token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from deltadecode.errors import UnsupportedCacheError
from deltadecode.models.clsa.configuration import ClsaConfig, check_config


class WindowLayer(DynamicSlidingWindowLayer):
    """The last W - 1 tokens of a layer, in memory of their own."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, Q, D]; returns them behind the window before them."""
        k, v = super().update(key_states, value_states, *args, **kwargs)
        if not self.record_past:
            # Not as a part of a whole prompt's keys, which it would keep.
            first = max(0, k.shape[2] - (self.sliding_window - 1))
            self.keys, self.values = k[:, :, first:].clone(), v[:, :, first:].clone()
        return k, v


class ClsaCache(Cache):
    """A growing cache: windows, then the shared keys and values, then the index keys.

    Of the shared layer, token t has one "head" of Hkv · D numbers, so that a token's keys lie
    together, as the operations read them. A Transformer's cache has a layer for each of its own.
    """

    def __init__(self, config: ClsaConfig) -> None:
        check_config(config)
        layers: list[Any]
        if config.mode == "transformer":
            layers = [DynamicLayer() for _ in range(config.num_hidden_layers)]
        else:
            layers = [WindowLayer(config.sliding_window) for _ in range(config.self_layers)]
            layers.append(DynamicLayer())
            if config.mode == "clsa":
                layers.append(DynamicLayer())
        super().__init__(layers=layers)
        self.shared_layer = config.self_layers

    def update_shared(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append shared keys and values [B, Q, Hkv, D]; returns all, [B, T, Hkv, D]."""
        heads = k.shape[2:]
        k, v = self.update(k.flatten(2)[:, None], v.flatten(2)[:, None], self.shared_layer)
        return k[:, 0].unflatten(-1, heads), v[:, 0].unflatten(-1, heads)

    def update_index(self, keys: Tensor) -> Tensor:
        """Append index keys [B, Q, d]; returns all, [B, T, d]."""
        keys = keys[:, None]
        return self.update(keys, keys[..., :0], self.shared_layer + 1)[0][:, 0]


def check_cache(cache: Any) -> None:
    """Refuse caches that have no place for shared keys and index keys.

    Raises
    ------
    UnsupportedCacheError
    """
    if cache is not None and not hasattr(cache, "update_shared"):
        raise UnsupportedCacheError(
            f"a CLSA model keeps its tokens in a ClsaCache, got {type(cache).__name__}"
        )
