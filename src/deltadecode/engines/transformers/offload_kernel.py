"""Kernels between pinned host memory and a pool on the GPU: missing pages in, a new token out.

They read which pages and cells these are on the GPU, where their selection is, so that the CPU need
not wait to learn it. ``TRITON_INTERPRET=1`` runs them on CPU tensors.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltadecode.ops.triton.direct import Launch

if TYPE_CHECKING:
    from deltadecode.engines.transformers.offload_pages import PageRequest

_WORDS = (torch.int64, torch.int32, torch.int16, torch.int8)


def gather_pages(host: Tensor, pool: Tensor, request: PageRequest) -> None:
    """Copy the missing pages of a request, on the current stream.

    Parameters
    ----------
    host : Tensor
        [slots, 2, B, Hkv, D], pinned.
    pool : Tensor
        [cells, P, 2, Hkv, D], contiguous.
    request : PageRequest
        On the device of the pool.
    """
    rows, width = request.missing.shape
    page, _, heads, dim = pool.shape[1:]
    # Bits are copied as whole numbers, whatever they mean, and as long ones as there are.
    size = dim * pool.element_size()
    word = next(word for word in _WORDS if size % word.itemsize == 0)
    run = heads * size // word.itemsize
    launch = _launch((rows * width, page, 1), width, host.shape[2], run, word, pool.device)
    launch(
        host.view(word),
        pool.view(word),
        request.missing,
        request.tokens,
        request.cells,
        request.row_numbers,
    )


def append_token(
    host: Tensor, token: int, pool: Tensor, request: PageRequest, key: Tensor, value: Tensor
) -> None:
    """Write a new token of a request's rows to the host and to their pages, on the current stream.

    Parameters
    ----------
    host : Tensor
        [slots, 2, B, Hkv, D], pinned.
    token : int
        Slot of the token.
    pool : Tensor
        [cells, P, 2, Hkv, D], contiguous.
    request : PageRequest
        On the device of the pool.
    key, value : Tensor
        [B, Hkv, 1, D] of the pool's dtype and device, with any strides.
    """
    grid = request.newest.shape[0], 2, 1
    of_key, of_value = key.stride(), value.stride()
    launch = _append_launch(
        grid, pool.shape[1:], host.shape[2], of_key, of_value, key.dtype, pool.device
    )
    # What changes from step to step is in the addresses: all other arguments stay with a launch.
    launch(
        key,
        value,
        host.select(0, token),
        pool.select(1, request.place),
        request.newest,
        request.row_numbers,
    )


@functools.lru_cache(maxsize=64)
def _append_launch(
    grid: tuple[int, int, int],
    of_cell: tuple[int, ...],
    batch: int,
    of_key: tuple[int, ...],
    of_value: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Launch:
    """The launch for tokens of one kind; ``dtype`` and ``device`` tell kinds apart alone."""
    page, _, heads, dim = of_cell
    (k_row, k_head, _, k_dim), (v_row, v_head, _, v_dim) = of_key, of_value
    numbers = page, batch, k_row, k_head, k_dim, v_row, v_head, v_dim
    block = min(1024, triton.next_power_of_2(heads * dim))
    return Launch(_append, grid, numbers, {"RUN": heads * dim, "DIM": dim, "BLOCK": block})


@functools.lru_cache(maxsize=64)
def _launch(
    grid: tuple[int, int, int],
    width: int,
    batch: int,
    run: int,
    word: torch.dtype,
    device: torch.device,
) -> Launch:
    """The launch of one kind of request; ``word`` and ``device`` tell kinds apart alone."""
    block = min(1024, triton.next_power_of_2(run))
    return Launch(_gather, grid, (width, batch), {"RUN": run, "BLOCK": block})


@triton.jit
def _gather(
    host,
    pool,
    missing,
    tokens,
    cells,
    row_numbers,
    width,
    batch,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0)
    place, page = tl.program_id(1), tl.num_programs(1)
    token = tl.load(tokens + entry * page + place)
    if tl.load(missing + entry) & (token >= 0):
        row = tl.load(row_numbers + entry // width)
        source = (token.to(tl.int64) * 2 * batch + row) * RUN
        target = (tl.load(cells + entry) * page + place) * 2 * RUN
        for half in tl.static_range(2):
            for first in tl.static_range(0, RUN, BLOCK):
                lane = first + tl.arange(0, BLOCK)
                word = tl.load(host + source + half * batch * RUN + lane, mask=lane < RUN)
                tl.store(pool + target + half * RUN + lane, word, mask=lane < RUN)


@triton.jit
def _append(
    key,
    value,
    slot,
    pool,
    newest,
    row_numbers,
    page,
    batch,
    k_row,
    k_head,
    k_dim,
    v_row,
    v_head,
    v_dim,
    RUN: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys or the values of one row; grid (R, 2). ``pool`` begins at the token's place."""
    entry, half = tl.program_id(0), tl.program_id(1)
    row = tl.load(row_numbers + entry)
    on_host = slot + (half * batch + row) * RUN
    in_pool = pool + (tl.load(newest + entry) * page * 2 + half) * RUN
    for first in tl.static_range(0, RUN, BLOCK):
        lane = first + tl.arange(0, BLOCK)
        head, dim = (lane // DIM).to(tl.int64), lane % DIM
        if half == 0:
            states = tl.load(key + row * k_row + head * k_head + dim * k_dim, mask=lane < RUN)
        else:
            states = tl.load(value + row * v_row + head * v_head + dim * v_dim, mask=lane < RUN)
        tl.store(on_host + lane, states, mask=lane < RUN)
        tl.store(in_pool + lane, states, mask=lane < RUN)
