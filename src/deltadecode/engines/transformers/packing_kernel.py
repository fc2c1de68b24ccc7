"""One kernel that packs the new token of a decode step, in place of two dozen small ones.

``TRITON_INTERPRET=1`` runs it on CPU tensors.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltadecode.ops.triton.direct import Launch
from deltadecode.ops.triton.finish import highest

# Added and taken away again, it leaves the nearest whole number of a float32, ties to even.
_WHOLE = tl.constexpr(12582912.0)
_TINY = tl.constexpr(2.0**-126)


def pack_token(keys: Tensor, values: Tensor, bytes_of_token: int, scales_at: int) -> Tensor:
    """Keys and values [B, Hkv, 1, D] as [2, B, 1, 1, bytes] int8, on the current stream.

    ``scales_at`` is the byte at which the scales begin.
    """
    rows, heads, _, dim = keys.shape
    packed = torch.zeros((2, rows, 1, 1, bytes_of_token), dtype=torch.int8, device=keys.device)
    keys, values = (part if part.stride(3) == 1 else part.contiguous() for part in (keys, values))
    strides = (*keys.stride()[:2], *values.stride()[:2])
    grid = rows, heads, 2
    _launch(grid, strides, bytes_of_token, dim, keys.dtype, keys.device)(
        keys, values, packed, packed[..., scales_at:].view(torch.int16)
    )
    return packed


@functools.lru_cache(maxsize=64)
def _launch(
    grid: tuple[int, int, int],
    strides: tuple[int, ...],
    bytes_of_token: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Launch:
    """The launch of tokens of one kind; ``dtype`` and ``device`` tell kinds apart alone."""
    constants = {"DIM": dim, "DIM_PAD": triton.next_power_of_2(dim), "num_warps": 1}
    return Launch(_pack, grid, (*strides, bytes_of_token), constants)


@triton.jit
def _pack(
    keys, values, numbers, scales, k_row, k_head, v_row, v_head, size,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr,
):  # fmt: skip
    """One head of one row, of the keys or of the values; grid (B, Hkv, 2)."""
    row, head, side = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dim = tl.arange(0, DIM_PAD)
    if side == 0:
        at = keys + row.to(tl.int64) * k_row + head * k_head
        states = tl.load(at + dim, mask=dim < DIM, other=0.0).to(tl.float32)
    else:
        at = values + row.to(tl.int64) * v_row + head * v_head
        states = tl.load(at + dim, mask=dim < DIM, other=0.0).to(tl.float32)
    most = highest(tl.abs(states))
    scale = tl.maximum(tl.div_rn(most, 127.0), _TINY, propagate_nan=tl.PropagateNan.ALL)
    # To the nearest bfloat16, ties to even: the upper half of a float32. The interpreter would cut.
    bits = scale.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    scale = (bits << 16).to(tl.float32, bitcast=True)
    whole = tl.div_rn(states, scale + tl.zeros_like(states)) + _WHOLE - _WHOLE
    token = (side * tl.num_programs(0) + row) * size
    tl.store(numbers + token + head * DIM + dim, whole.to(tl.int8), mask=dim < DIM)
    tl.store(scales + token // 2 + head, bits.to(tl.int16))
