"""Host memory for a layer's keys and values, and the copies between it and a device.

A host buffer is [tokens, 2, B, Hkv, D]: a token of all rows is one run of memory, and so are the
tokens of a page of a batch of one. A pool of pages on the device is [cells, P, 2, Hkv, D].
"""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from mmap import PAGESIZE
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltadecode.errors import UnsupportedCacheError

if TYPE_CHECKING:
    from deltadecode.engines.transformers.offload_pages import PageRequest

# Bytes that are staged on the device at a time, on their way to or from the host.
_STAGED_BYTES = 64 * 2**20

# Pinned for all devices.
_PORTABLE = 1

# Where control groups of version 2 and 1 say their limit, what is used, and what of it are files.
_CGROUP = Path("/sys/fs/cgroup")
_GROUPS = [
    (_CGROUP, "memory.max", "memory.current", "file"),
    (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
]


class Transfer:
    """Copies between a host and a simulated device, which is the CPU itself.

    The semantics of every other transfer, and what tests of the cache run on.
    """

    def check(self, device: torch.device) -> None:
        """Refuse a device that it does not copy to."""

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory on the host, uninitialised; steps outside of inference mode may write to it."""
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype)

    def store(self, host: Tensor, start: int, key: Tensor, value: Tensor) -> None:
        """Copy new tokens [B, Hkv, T, D] to the host, from token ``start`` on."""
        for first, stop in _chunks(key):
            staged = stage(key[:, :, first:stop], value[:, :, first:stop])
            host[start + first : start + stop].copy_(staged, non_blocking=True)

    def load(self, host: Tensor, tokens: int, key: Tensor, value: Tensor) -> None:
        """Copy the first tokens on the host to states [B, Hkv, tokens or more, D]."""
        for first, stop in _chunks(key[:, :, :tokens]):
            staged = host[first:stop].to(key.device, non_blocking=True)
            key[:, :, first:stop].copy_(staged[:, 0].permute(1, 2, 0, 3))
            value[:, :, first:stop].copy_(staged[:, 1].permute(1, 2, 0, 3))

    def append(
        self,
        host: Tensor,
        token: int,
        pool: Tensor | None,
        requests: Sequence[PageRequest],
        key: Tensor,
        value: Tensor,
    ) -> None:
        """Write a new token [B, Hkv, 1, D] to its slot on the host and, as requests say, to a pool.

        What they fetch must have been waited for: it may write to the place of the token.
        """
        staged = stage(key, value)
        host[token : token + 1].copy_(staged, non_blocking=True)
        newest = staged[0].transpose(0, 1)
        for request in requests:
            assert pool is not None
            pool[request.newest, request.place] = newest[request.row_numbers]

    def fetching(self, device: torch.device) -> AbstractContextManager[Any]:
        """Where :meth:`fetch` is called: behind what was launched until now."""
        return contextlib.nullcontext()

    def fetch(self, host: Tensor, pool: Tensor, request: PageRequest, ticket: Any = None) -> Any:
        """Copy the missing pages of a request to a pool.

        Gives what :meth:`wait` takes; ``ticket`` is what the pool's last fetch gave.
        """
        row, place = request.missing.nonzero(as_tuple=True)
        tokens = request.tokens[row, place]
        # Tokens that are not on the host yet are copied from another one, and written later.
        held = tokens.clamp(min=0).cpu()
        pages = host[held, :, request.row_numbers[row].cpu()[:, None]]
        pool[request.cells[row, place]] = pages.to(pool.device)
        return ticket

    def wait(self, ticket: Any, device: torch.device) -> None:
        """Let the device's work from now on come after a fetch."""

    def settle(self) -> None:
        """Wait until everything that was stored can be read from the host."""


class CudaTransfer(Transfer):
    """Copies between pinned host memory and CUDA devices, beside the model's own work.

    Each device has one stream of copies: prompts stream out on it and pages are fetched on it, both
    while layers compute. With ``gather`` one kernel per layer fetches pages straight from host
    memory, without the CPU learning which, and another one writes the new token to the host and to
    the pool; else, and where memory cannot be pinned, the CPU gathers pages first.
    """

    def __init__(self, gather: bool = True) -> None:
        self.gather = gather
        self.pinned = True
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Streams stay with the process."""
        return type(self), (self.gather,)

    def check(self, device: torch.device) -> None:
        """Refuse any device but CUDA's.

        Raises
        ------
        UnsupportedCacheError
            Naming the device.
        """
        if device.type != "cuda":
            raise UnsupportedCacheError(
                f"an offloaded cache needs a CUDA device, got {device}: without one the cache is "
                "in host memory already; use the default cache"
            )

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Pinned memory; pageable memory, with one warning, where the system refuses to pin."""
        size = math.prod(shape) * dtype.itemsize
        # Whole pages of its own: memory is pinned by pages, and each of them once.
        whole = -(-size // PAGESIZE) * PAGESIZE
        room = super().allocate((whole + PAGESIZE,), torch.uint8)
        own = room[-room.data_ptr() % PAGESIZE :]
        if self.pinned and size and not _pin(own[:whole]):
            self.pinned = False
            warnings.warn(
                f"the system refused to pin {size:,} bytes of host memory: pages are fetched more "
                "slowly; raise the limit of locked memory (ulimit -l)",
                stacklevel=2,
            )
        return own[:size].view(dtype).view(shape)

    def store(self, host: Tensor, start: int, key: Tensor, value: Tensor) -> None:
        """Copy new tokens to the host; a prompt's on the stream of copies."""
        if key.shape[2] == 1:
            super().store(host, start, key, value)
            return
        stream = self._stream(key.device)
        stream.wait_stream(torch.cuda.current_stream(key.device))
        with torch.cuda.stream(stream):
            super().store(host, start, key, value)
        # Their memory must not be given to others before they are copied.
        key.record_stream(stream)
        value.record_stream(stream)

    def load(self, host: Tensor, tokens: int, key: Tensor, value: Tensor) -> None:
        """Copy tokens to the device, in the order of the model's own work."""
        torch.cuda.current_stream(key.device).wait_stream(self._stream(key.device))
        super().load(host, tokens, key, value)

    def append(
        self,
        host: Tensor,
        token: int,
        pool: Tensor | None,
        requests: Sequence[PageRequest],
        key: Tensor,
        value: Tensor,
    ) -> None:
        """Write a new token in the order of the model's own work; a kernel for each request."""
        rows = sum(request.newest.shape[0] for request in requests)
        # A step of full attention requests nothing, and one that broke off perhaps too little.
        if pool is None or rows != key.shape[0] or not (self.gather and self.pinned):
            super().append(host, token, pool, requests, key, value)
            return
        from deltadecode.engines.transformers.offload_kernel import append_token

        with torch.cuda.device_of(key):
            for request in requests:
                append_token(host, token, pool, request, key, value)

    def fetching(self, device: torch.device) -> AbstractContextManager[Any]:
        """Fetch behind the attention that reads the pools, and behind what stores tokens.

        What is allocated within belongs to the stream of copies: a pool must not be.
        """
        stream = self._stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(stream)

    def fetch(self, host: Tensor, pool: Tensor, request: PageRequest, ticket: Any = None) -> Any:
        """Fetch on the stream of copies; gives the event of the last copy."""
        stream = self._stream(pool.device)
        if self.gather and self.pinned:
            from deltadecode.engines.transformers.offload_kernel import gather_pages

            gather_pages(host, pool, request)
        else:
            # The CPU reads the host: what was stored must have arrived.
            stream.synchronize()
            super().fetch(host, pool, request)
        # To make one takes longer than to record it again.
        event = torch.cuda.Event() if ticket is None else ticket
        event.record(stream)
        return event

    def wait(self, ticket: Any, device: torch.device) -> None:
        """Let the current stream wait for a fetch."""
        torch.cuda.current_stream(device).wait_event(ticket)

    def settle(self) -> None:
        """Wait for the devices that have copied."""
        for device in self._streams:
            torch.cuda.synchronize(device)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def stage(key: Tensor, value: Tensor) -> Tensor:
    """States [B, Hkv, T, D] as a host buffer has them, [T, 2, B, Hkv, D]."""
    return torch.stack([key.permute(2, 0, 1, 3), value.permute(2, 0, 1, 3)], dim=1)


def _chunks(states: Tensor) -> list[tuple[int, int]]:
    """Ranges of tokens that are staged together."""
    tokens = states.shape[2]
    of_token = 2 * states.element_size() * states[:, :, :1].numel()
    size = max(1, _STAGED_BYTES // max(1, of_token))
    return [(first, min(first + size, tokens)) for first in range(0, tokens, size)]


def _pin(tensor: Tensor) -> bool:
    """Pin the memory of a tensor until that is freed; PyTorch's own would round it up, to 2^k."""
    runtime: Any = torch.cuda.cudart()
    address = tensor.data_ptr()
    try:
        refused = int(runtime.cudaHostRegister(address, tensor.nbytes, _PORTABLE))
    except RuntimeError:
        return False
    if refused:
        # The runtime keeps the error for the next launch, which takes it up and clears it.
        with contextlib.suppress(RuntimeError, AssertionError):
            torch.zeros(1, device="cuda")
        return False
    # The storage is what views share, and the last of them frees.
    unpin = weakref.finalize(tensor.untyped_storage(), _unpin, address)
    unpin.atexit = False
    return True


def _unpin(address: int) -> None:
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)  # copies may still be under way
    torch.cuda.cudart().cudaHostUnregister(address)


def free_host_bytes() -> int | None:
    """Host memory that this process may still take; None where the system does not say."""
    free = _number(Path("/proc/meminfo"), "MemAvailable:")
    free = None if free is None else free * 1024
    for group, limit, usage, files in _GROUPS:
        most, used = _number(group / limit), _number(group / usage)
        if most is not None and used is not None:
            # What a group has in files can be taken from it.
            cached = _number(group / "memory.stat", files) or 0
            left = max(0, most - used + cached)
            free = left if free is None else min(free, left)
    return free


def _number(path: Path, name: str | None = None) -> int | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        if name is None or words[:1] == [name]:
            value = words[0 if name is None else 1]
            return int(value) if value.isdigit() else None
    return None
