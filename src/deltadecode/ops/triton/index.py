"""Scores of one query head against every key of a row: what an index selects by.

Bound by reading the keys, once each. Thread blocks past a row's last token end at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def score(
    q_ptr, keys_ptr, table_ptr, lens_ptr, out_ptr, q_row, block_row, slot_row, table_row, width,
    scale, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE tokens of one row; grid (width / TILE, B)."""
    row = tl.program_id(1)
    n = tl.load(lens_ptr + row)
    start = tl.program_id(0) * TILE
    if start >= n:
        return
    token = start + tl.arange(0, TILE)
    valid = token < n
    dim = tl.arange(0, DIM_PAD)
    held = dim < DIM
    q = tl.load(q_ptr + row.to(tl.int64) * q_row + dim, mask=held, other=0.0).to(tl.float32)
    block = tl.load(table_ptr + row.to(tl.int64) * table_row + token // BLOCK, mask=valid, other=0)
    at = block.to(tl.int64) * block_row + (token % BLOCK).to(tl.int64) * slot_row
    k = tl.load(keys_ptr + at[:, None] + dim[None, :], mask=valid[:, None] & held[None, :],
                other=0.0)  # fmt: skip
    scores = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale
    tl.store(out_ptr + row.to(tl.int64) * width + token, scores, mask=valid)
