"""What cannot be decoded from an offloaded cache, refused before anything has run."""

from __future__ import annotations

from typing import Any

import torch

from deltadecode.architecture import text_config, token_elements
from deltadecode.engines.transformers.offload import DeltaOffloadedCache
from deltadecode.engines.transformers.offload_host import CudaTransfer
from deltadecode.engines.transformers.state import ModelState
from deltadecode.errors import UnsupportedCacheError


def check_offloaded(cache: DeltaOffloadedCache, state: ModelState) -> None:
    """Refuse an offloaded cache in lossless mode, or of another plan.

    Raises
    ------
    UnsupportedCacheError
        Naming both plans.
    """
    if state.draft_tokens:
        raise UnsupportedCacheError(
            "lossless decoding reads every layer whole, got an offloaded cache; use the default "
            "cache, or enable without lossless=True"
        )
    if cache.shared.cfg != state.cfg:
        raise UnsupportedCacheError(
            f"an offloaded cache must be made for the plan of its model, {state.cfg}, got one for "
            f"{cache.shared.cfg}"
        )


def check_offload(model: Any, state: ModelState, rows: int, tokens: int) -> None:
    """Refuse what ``cache_implementation="offloaded"`` cannot do.

    ``tokens`` is how many slots of each row the call stores at most.

    Raises
    ------
    UnsupportedCacheError
        In lossless mode, without a CUDA device, for layers that cannot be offloaded, or when the
        host has no room for the prompt and the tokens that are asked for.
    """
    cache = DeltaOffloadedCache(model.config, state.cfg)
    check_offloaded(cache, state)
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("meta")}
    for device in sorted(devices, key=str):
        CudaTransfer().check(device)
    elements = token_elements(text_config(model.config))
    if elements is not None and not cache.shared.fits(tokens):
        cache.shared.check_room(tokens, rows * elements * model.dtype.itemsize)
