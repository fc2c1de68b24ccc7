"""What the cache of a model needs, all on the device or with its sparse layers on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltadecode.architecture import text_config, token_heads
from deltadecode.config import DeltaConfig, LayerPlan
from deltadecode.engines.transformers.offload_pages import pool_pages
from deltadecode.engines.transformers.packing import packed_bytes

# Bytes of a number where a configuration names no type.
_HALF = 2


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of the planned layers' keys and values, for one sequence.

    Attributes
    ----------
    tokens : int
        Tokens of the sequence.
    device : int
        Bytes on the device in a DeltaCache.
    offloaded_device, offloaded_host : int
        Bytes on device and host in a DeltaOffloadedCache, without room for more tokens.
    """

    tokens: int
    device: int
    offloaded_device: int
    offloaded_host: int


def token_bytes(config: Any, itemsize: int, kv_dtype: str | None) -> int | None:
    """Bytes of a token's keys and values in one layer; None where nothing says it.

    ``itemsize`` is that of the model's type, which counts without a ``kv_dtype``.
    """
    heads = token_heads(text_config(config))
    if heads is None:
        return None
    own, dim = heads
    return 2 * (own * dim * itemsize if kv_dtype is None else packed_bytes(own, dim))


def cache_bytes(
    config: Any, cfg: DeltaConfig, plan: LayerPlan, tokens: int, kv_dtype: str | None = None
) -> CacheBytes | None:
    """Count them from a model's configuration; None where that does not say enough."""
    itemsize = getattr(getattr(text_config(config), "dtype", None), "itemsize", _HALF)
    of_token = token_bytes(config, itemsize, kv_dtype)
    if of_token is None:
        return None
    layers, sparse = len(plan.attention_layers), plan.roles.count("sparse")
    whole = tokens * of_token
    if cfg.reads_all(tokens):
        return CacheBytes(tokens, layers * whole, layers * whole, 0)
    # One more page of a row is spare.
    pool = (pool_pages(cfg, tokens) + 1) * cfg.page_size * of_token
    return CacheBytes(
        tokens, layers * whole, (layers - sparse) * whole + sparse * pool, sparse * whole
    )
