"""What an offloaded cache holds, and what it had to fetch."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


class OffloadStats:
    """Bytes on device and host, and fetched pages since the model was enabled or the last reset.

    All numbers are 0, and the hit rate is 1.0, while a model decodes from no offloaded cache.

    Attributes
    ----------
    steps : int
        Decode steps in which sparse layers read pages from pools.
    read_pages : int
        Pages that sparse layers read in those steps, over all layers and rows.
    """

    def __init__(self) -> None:
        self._cache: Any = None
        self.reset()

    def reset(self) -> None:
        """Set every count to zero; what is held stays."""
        self.steps = self.read_pages = 0
        # Device, layers and their bytes of a page -> pages that each layer fetched, one int64.
        # Left there: reading it would wait for the GPU.
        self._fetched: dict[tuple[torch.device, int, int], Tensor] = {}

    @property
    def device_bytes(self) -> int:
        """Bytes of the cache on devices, pools and the room behind tokens included."""
        cache = None if self._cache is None else self._cache()
        return 0 if cache is None else int(cache.device_bytes)

    @property
    def host_bytes(self) -> int:
        """Bytes of the cache on the host, with the room behind tokens."""
        cache = None if self._cache is None else self._cache()
        return 0 if cache is None else int(cache.host_bytes)

    @property
    def fetched_pages(self) -> int:
        """Pages that were copied from the host, over all layers and rows."""
        return sum(layers * int(pages) for (_, layers, _), pages in self._fetched.items())

    @property
    def fetched_bytes(self) -> int:
        """Bytes that were copied from the host for decode steps."""
        return sum(of_page * int(pages) for (_, _, of_page), pages in self._fetched.items())

    @property
    def fetched_bytes_per_step(self) -> float:
        """``fetched_bytes / steps``; 0.0 before the first step."""
        return self.fetched_bytes / self.steps if self.steps else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the pages read that were not fetched; 1.0 before the first step."""
        return 1.0 - self.fetched_pages / self.read_pages if self.read_pages else 1.0

    def __repr__(self) -> str:
        return (
            f"OffloadStats(device_bytes={self.device_bytes}, host_bytes={self.host_bytes}, "
            f"fetched_bytes_per_step={self.fetched_bytes_per_step:.0f}, "
            f"hit_rate={self.hit_rate:.4f})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the counts, and holds no cache."""
        return {**vars(self), "_cache": None}

    def follow(self, cache: Any) -> None:
        """Tell the bytes of a cache from now on, as long as it lives."""
        self._cache = weakref.ref(cache)

    def add_step(self) -> None:
        """Count one decode step that fetches pages."""
        self.steps += 1

    def add(self, fetch: Any) -> None:
        """Count what was fetched for the sparse layers of one Δ-layer.

        Parameters
        ----------
        fetch : deltadecode.engines.transformers.offload.Fetch
            Of one row group.
        """
        self.read_pages += fetch.read
        kind = fetch.missing.device, fetch.layers, fetch.bytes_of_page
        seen = self._fetched.get(kind)
        self._fetched[kind] = fetch.missing if seen is None else seen + fetch.missing
