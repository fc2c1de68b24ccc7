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

    def check_crop(self, tokens: int) -> None:
        """Refuse to take ``tokens`` back if earlier ones, then in the window, are forgotten."""
        if not tokens or self.keys is None:
            return
        forgotten = self.cumulative_length - self.keys.shape[2]
        if forgotten > max(0, self.cumulative_length - tokens - self.sliding_window + 1):
            raise UnsupportedCacheError(
                f"a window of {self.sliding_window} tokens cannot take {tokens} back, since those "
                f"before them are forgotten; call activate_past_recording before they are read"
            )


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
        self.made_for = cache_shape(config)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a context has no end here, whatever a window keeps of it."""
        return -1 if layer_idx is None else super().get_max_length(layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, ``-tokens_to_remove`` of them; of all layers or of none.

        Raises
        ------
        UnsupportedCacheError
            For more tokens than there are, or than a window can take back.
        """
        tokens, held = max(0, -tokens_to_remove), self.get_seq_length()
        if tokens > held:
            raise UnsupportedCacheError(f"a ClsaCache of {held} tokens cannot take {tokens} back")
        for layer in self.layers:
            if isinstance(layer, WindowLayer):
                layer.check_crop(tokens)
        super().crop(tokens_to_remove)

    def update_shared(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append shared keys and values [B, Q, Hkv, D]; returns all, [B, T, Hkv, D]."""
        heads = k.shape[2:]
        k, v = self.update(k.flatten(2)[:, None], v.flatten(2)[:, None], self.shared_layer)
        return k[:, 0].unflatten(-1, heads), v[:, 0].unflatten(-1, heads)

    def update_index(self, keys: Tensor) -> Tensor:
        """Append index keys [B, Q, d]; returns all, [B, T, d]."""
        keys = keys[:, None]
        return self.update(keys, keys[..., :0], self.shared_layer + 1)[0][:, 0]


def cache_shape(config: ClsaConfig) -> dict[str, Any]:
    """What of a configuration decides the layout of a cache."""
    names = ["mode", "num_hidden_layers", "num_key_value_heads", "head_dim"]
    if config.mode != "transformer":
        names.append("sliding_window")
    if config.mode == "clsa":
        names.append("index_head_dim")
    return {name: getattr(config, name) for name in names}


def check_cache(cache: Any, config: ClsaConfig) -> None:
    """Refuse caches that have no place for shared keys and index keys, or another model's.

    Raises
    ------
    UnsupportedCacheError
    """
    if cache is not None and not hasattr(cache, "update_shared"):
        raise UnsupportedCacheError(
            f"a CLSA model keeps its tokens in a ClsaCache, got {type(cache).__name__}"
        )
    if cache is None:
        return
    for name, own in cache_shape(config).items():
        theirs = cache.made_for.get(name)
        if theirs != own:
            raise UnsupportedCacheError(
                f"a model with {name} {own!r} cannot use a cache that was made for {theirs!r}"
            )
