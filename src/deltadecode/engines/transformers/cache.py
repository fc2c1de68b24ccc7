"""The KV cache that DELTA decodes from, for the layers that it plans."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from deltadecode.architecture import attention_layers, num_layers, text_config
from deltadecode.engines.transformers.layers import DeltaLayer, Reading, StoredLayer
from deltadecode.engines.transformers.packing import Packing, check_kv_dtype
from deltadecode.engines.transformers.rows import RowGroup
from deltadecode.errors import UnsupportedCacheError


class DeltaCache(DynamicCache):
    """The cache that ``attn_implementation="delta"`` decodes from.

    Full-attention layers are :class:`DeltaLayer`; sliding-window, linear and other layers keep the
    class that :class:`transformers.DynamicCache` gives them. ``generate`` makes one by itself,
    returns it with ``return_dict_in_generate=True``, and takes it back as ``past_key_values`` to
    continue a conversation.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The model's.
    kv_dtype : str, optional
        ``"int8"`` or ``"fp8"`` (e4m3): store keys and values of full-attention layers in eight
        bits, with a scale for each token and KV head. By default as the model makes them.

    Raises
    ------
    UnsupportedModelError
        When the model has no full-attention layer that could be planned.
    UnsupportedCacheError
        For eight bits, where layers share keys and values with others.
    ArgumentError
        For another ``kv_dtype``.
    """

    # Whether layers lie on the host, and steps fetch pages.
    fetches = False

    def __init__(self, config: Any, *, kv_dtype: str | None = None) -> None:
        check_kv_dtype(kv_dtype)
        planned = attention_layers(config)
        if kv_dtype is not None:
            check_unshared(config, "stored in eight bits")
        self.kv_dtype, self._reading = kv_dtype, Reading()
        super().__init__(config=config)
        self.num_layers = num_layers(text_config(config))
        # Some versions leave out layers that share the keys of others; for the decoder of an
        # encoder-decoder they count the encoder's layers.
        while len(self.layers) < self.num_layers:
            self.layers.append(DynamicLayer())
        for layer in planned:
            # A window as long as the longest sequence counts as full attention, but comes as a
            # sliding-window layer. Anything else is a layer with a state of its own: left alone.
            if type(self.layers[layer]) in (DynamicLayer, DynamicSlidingWindowLayer):
                self.layers[layer] = (
                    DeltaLayer()
                    if kv_dtype is None
                    else StoredLayer(self._reading, Packing(kv_dtype))
                )

    @property
    def apart(self) -> bool:
        """Whether attention may have to read layers where they are stored."""
        return self.kv_dtype is not None

    def begin(self, paging: bool) -> None:
        """Begin a pass; ``paging``: a decode step, which reads pages."""
        self._reading.paging = paging

    def held(self, number: int) -> StoredLayer | None:
        """A layer, if attention reads it where it is stored."""
        layer: Any = self.layers[number]
        return layer if isinstance(layer, StoredLayer) and layer.apart else None

    def select(self, source: int, group: RowGroup, length: int) -> None:
        """Begin the selections of a Δ-layer in a step of ``length`` slots."""

    def request(self, source: int, place: int, group: RowGroup, ids: Tensor, counts: Tensor) -> Any:
        """Fetch what a Δ-layer has selected, where there is something to fetch."""

    @property
    def device_bytes(self) -> int:
        """Bytes of keys and values on devices, room behind them and pools included."""
        return sum(_device_bytes(layer) for layer in self.layers)


def check_unshared(config: Any, what: str) -> None:
    """Refuse layers that read the keys of others: those are never read from the cache.

    Raises
    ------
    UnsupportedCacheError
        Naming their number.
    """
    sharing = getattr(text_config(config), "num_kv_shared_layers", 0)
    if sharing:
        raise UnsupportedCacheError(
            f"layers that read the keys of others cannot be {what}, got "
            f"num_kv_shared_layers={sharing}; use the default cache"
        )


def _device_bytes(layer: Any) -> int:
    held: Any = getattr(layer, "device_bytes", None)
    if held is not None:
        return int(held)
    states = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(part.untyped_storage().nbytes() for part in states if isinstance(part, Tensor))
