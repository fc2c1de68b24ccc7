"""One kernel that copies pages from pinned host memory to a pool on the GPU.

It reads which pages are missing on the GPU, where their selection is, so that the CPU need not wait
to learn it. ``TRITON_INTERPRET=1`` runs it on CPU tensors.
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
