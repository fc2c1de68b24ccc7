"""What cannot be decoded from an offloaded cache, refused before anything has run."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import torch

from deltadecode.engines.transformers.offload import DeltaOffloadedCache
from deltadecode.engines.transformers.offload_size import token_bytes
from deltadecode.engines.transformers.state import ModelState
from deltadecode.errors import UnsupportedCacheError


def check_offloaded(cache: DeltaOffloadedCache, state: ModelState) -> None:
    """Refuse an offloaded cache in lossless mode, or of another plan.

    Raises
    ------
    UnsupportedCacheError
        Naming the first field that differs.
    """
    if state.draft_tokens:
        raise UnsupportedCacheError(
            "lossless decoding reads every layer whole, got an offloaded cache; use the default "
            "cache, or enable without lossless=True"
        )
    ours, plan = cache.shared.cfg.to_dict(), state.cfg.to_dict()
    for name, wanted in plan.items():
        if ours[name] != wanted:
            raise UnsupportedCacheError(
                f"an offloaded cache must be made for the plan of its model, with {name}={wanted}, "
                f"got {ours[name]}"
            )


def check_offload(model: Any, state: ModelState, rows: int, tokens: int, prompt: int) -> None:
    """Refuse what ``cache_implementation="offloaded"`` cannot do; arguments of check_host.

    Raises
    ------
    UnsupportedCacheError
        In lossless mode, for layers that cannot be offloaded, or as :func:`check_host`.
    """
    cache = DeltaOffloadedCache(model.config, state.cfg, kv_dtype=state.kv_dtype)
    check_offloaded(cache, state)
    check_host(model, cache, rows, tokens, prompt)


@torch.compiler.disable  # it reads files
def check_host(
    model: Any, cache: DeltaOffloadedCache, rows: int, tokens: int, prompt: int | None = None
) -> None:
    """Refuse a cache on a device that it does not copy to, or of more than the host has room for.

    Parameters
    ----------
    model : PreTrainedModel
        Its parameters say the devices.
    cache : DeltaOffloadedCache
        The cache; nothing of it changes.
    rows : int
        Rows that it gets.
    tokens : int
        Slots of each row, at most, with those that it holds.
    prompt : int, optional
        Those before the first decode step; by default all of them.

    Raises
    ------
    UnsupportedCacheError
        Naming the device, or the bytes that are needed and free.
    """
    shared = cache.shared
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("meta")}
    for device in sorted(devices, key=str):
        shared.transfer.check(device)
    of_token = token_bytes(model.config, model.dtype.itemsize, cache.kv_dtype)
    if of_token is None or shared.cfg.reads_all(tokens):
        return
    first = tokens if prompt is None else min(prompt, tokens)
    # Within the budget tokens are on the device: they move out with the first one beyond it.
    beyond = bisect_left(range(tokens), True, lo=first, key=lambda n: not shared.cfg.reads_all(n))
    shared.check_room(tokens, rows * of_token, beyond)
