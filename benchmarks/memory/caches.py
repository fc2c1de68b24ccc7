"""The caches that are compared: how each is made and filled, and the bytes that it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import deltadecode as dd
from benchmarks.e2e.shapes import ModelShape
from deltadecode.engines.transformers.offload_host import CudaTransfer, Transfer, free_host_bytes
from deltadecode.engines.transformers.offload_pages import pool_pages
from deltadecode.engines.transformers.offload_room import Offload
from deltadecode.engines.transformers.packing import packed_bytes
from deltadecode.errors import UnsupportedCacheError

STOCK, STOCK_OFFLOADED = "DynamicCache", "DynamicCache, offloaded"
DELTA, OURS = "DeltaCache", "DeltaOffloadedCache"
# By the names that the command line has for them.
PEERS = {"delta": DELTA, "stock": STOCK, "stock-offloaded": STOCK_OFFLOADED}
# Steps that are not counted: the first one fills the pools, the second one records layer graphs.
WARMUP = 3
# What a cache raises that has no room.
NO_ROOM = torch.OutOfMemoryError, UnsupportedCacheError
NUMBER = 2  # bytes of a key's or value's number, bfloat16

# A prompt has the keys and values of two layers on their way to the host.
_IN_FLIGHT = 2.0
# The keys of one layer lie there twice while they are appended to.
_APPENDED = 0.5
_SPARE = 1 / 128  # room that DeltaCache takes behind a full buffer
# Transformers has a layer's old and new states, the one before it and the one behind it there.
_STOCK_IN_FLIGHT = 4.0


def reason(error: Exception) -> str:
    """Why a cache did not fit, of an error of `NO_ROOM`, in one line."""
    return str(error).splitlines()[0][:200]


@dataclass(frozen=True)
class Needs:
    """Bytes that a cache of so many tokens needs on the GPU and on the host."""

    gpu: int
    host: int


@dataclass(frozen=True)
class Kind:
    """One kind of cache of a shape with a plan; ``kv_dtype`` is that of DELTA's own.

    ``gather`` is whether a kernel fetches pages, or else the CPU gathers them.
    """

    name: str
    shape: ModelShape
    plan: dd.DeltaConfig
    kv_dtype: str | None = None
    gather: bool = True

    @property
    def is_ours(self) -> bool:
        """Whether DELTA decodes from it."""
        return self.name in (DELTA, OURS)

    def make(self, config: Any, device: torch.device) -> Any:
        """An empty cache; off CUDA the host of an offloaded one is simulated."""
        if self.name == DELTA:
            return dd.DeltaCache(config, kv_dtype=self.kv_dtype)
        if self.name == OURS:
            transfer = CudaTransfer(self.gather) if device.type == "cuda" else Transfer()
            return dd.DeltaOffloadedCache(
                config, self.plan, transfer=transfer, kv_dtype=self.kv_dtype
            )
        return DynamicCache(config=config, offloading=self.name == STOCK_OFFLOADED)

    def refused(self, batch: int, tokens: int, device: torch.device) -> str | None:
        """Why it cannot be filled with so many tokens on this machine's host; None if it can.

        Transformers' own would be killed by the system, and says nothing before.
        """
        if self.name == STOCK_OFFLOADED and device.type != "cuda":
            return "Transformers' offloading needs a GPU"
        needed, free = self.needs(batch, tokens).host, free_host_bytes()
        if free is not None and needed > free:
            return f"needs {needed:,} bytes of host memory, got {free:,} free"
        return None

    def needs(self, batch: int, tokens: int) -> Needs:
        """Bytes at most, in a prompt of whole layers or in a decode step."""
        layers = self.shape.layers
        heads, dim = self.shape.kv_heads, self.shape.head_dim
        packed = self.is_ours and self.kv_dtype is not None
        of_token = 2 * batch * (packed_bytes(heads, dim) if packed else heads * dim * NUMBER)
        layer = tokens * of_token
        if self.name == STOCK:
            return Needs(math.ceil(layer * (layers + _APPENDED)), 0)
        if self.name == DELTA:
            return Needs(math.ceil(layer * (layers * (1 + _SPARE) + _APPENDED)), 0)
        if self.name == STOCK_OFFLOADED:
            # PyTorch takes pinned memory in powers of two.
            pinned = 2 ** math.ceil(math.log2(max(1, layer // 2)))
            return Needs(math.ceil(layer * _STOCK_IN_FLIGHT), 2 * pinned * (layers + 1))
        sparse = self.plan.layer_plan(layers).roles.count("sparse")
        pool = (pool_pages(self.plan, tokens) + 1) * self.plan.page_size * of_token
        full = (layers - sparse) * (1 + _SPARE) + _APPENDED + _IN_FLIGHT
        return Needs(
            math.ceil(layer * full) + sparse * pool, sparse * of_token * Offload.room_for(tokens)
        )

    def longest(self, batch: int, gpu: int, host: int | None) -> int:
        """Most tokens whose needs are within these bytes; of the host, None means no bound."""
        least, most = 0, 1 << 40
        while most - least > 1:
            tokens = (least + most) // 2
            needs = self.needs(batch, tokens)
            fits = needs.gpu <= gpu and (host is None or needs.host <= host)
            least, most = (tokens, most) if fits else (least, tokens)
        return least


def kinds(
    shape: ModelShape,
    plan: dd.DeltaConfig,
    kv_dtype: str | None = None,
    gather: bool = True,
    peers: Sequence[str] = tuple(PEERS),
) -> list[Kind]:
    """DELTA's offloaded cache and its peers, the slowest last."""
    names = [OURS, *(name for peer, name in PEERS.items() if peer in peers)]
    return [Kind(name, shape, plan, kv_dtype, gather) for name in names]


def fill(cache: Any, shape: ModelShape, like: Tensor, batch: int, tokens: int) -> None:
    """Store ``tokens`` random tokens in an empty cache, of the type and device of ``like``.

    Memory is taken as by a prompt, and then filled where it is: no states of a layer lie beside it.
    What is on the host keeps one token over and over, which no Δ-layer reads; numbers of eight bits
    keep its scales.
    """
    for layer in range(shape.layers):
        one = torch.randn(
            (2, batch, shape.kv_heads, 1, shape.head_dim), dtype=like.dtype, device=like.device
        )
        keys, values = one.expand(-1, -1, -1, tokens, -1)
        cache.update(keys, values, layer)
    for stored in cache.layers:
        if getattr(stored, "offloaded", False):
            continue
        packing = getattr(stored, "packing", None)
        for states in (stored.keys, stored.values):
            if packing is not None:
                numbers, _ = packing.parts(states.transpose(1, 2))
                numbers.copy_(torch.randint_like(numbers, -127, 128, dtype=torch.int8))
            elif states.device == like.device:
                states.normal_()


def held_bytes(cache: Any, device: torch.device) -> Needs:
    """Bytes that a cache holds now, with the room behind its tokens."""
    if isinstance(cache, dd.DeltaOffloadedCache):
        return Needs(cache.device_bytes, cache.host_bytes)
    sizes = {"gpu": 0, "host": 0}
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            place = "gpu" if states.device.type == device.type else "host"
            sizes[place] += states.untyped_storage().nbytes()
    return Needs(**sizes)


def free_all() -> None:
    """Give back what dropped caches held on the GPU and in pinned memory."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        # As PyTorch has it, by version.
        places = (torch.accelerator, "empty_host_cache"), (torch._C, "_host_emptyCache")
        for place, name in places:
            empty: Callable[[], None] | None = getattr(place, name, None)
            if empty is not None:
                empty()
                return
