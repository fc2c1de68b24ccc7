"""Random paged caches on the GPU, everything that must not be read filled with NaN."""

import math
from dataclasses import dataclass

import torch

from deltadecode import ops


@dataclass
class GpuCase:
    """Arguments of decode_attention, and the same in float64."""

    arguments: tuple
    options: dict
    page_size: int
    lengths: list

    def run(self, backend="triton", **more):
        return ops.decode_attention(*self.arguments, **self.options, **more, backend=backend)

    def exact(self, **more):
        """The definition in float64, from the same rounded inputs."""
        q, k, v, table, lens = self.arguments
        options = dict(self.options)
        k_scale, v_scale = options.pop("k_scale", 1.0), options.pop("v_scale", 1.0)
        inputs = q.double(), k.double() * k_scale, v.double() * v_scale, table, lens
        return ops.decode_attention(*inputs, **options, **more, backend="reference")


def make_gpu_case(
    lengths, *, kv_heads=2, group=6, dim=128, page_size=16, block_size=16, dtype=torch.bfloat16,
    cache_dtype=None, sinks=False, softcap=None, contrast=4.0, seed=0, spare=3,
    tokens=None,
):  # fmt: skip
    """vLLM's layout: one allocation [2, blocks, block_size, Hkv, D], blocks in random order.

    With ``tokens`` q is that of verify rows, [B, tokens, Hq, D].
    """
    torch.manual_seed(seed)
    rows, longest = len(lengths), max(lengths)
    per_row = -(-longest // block_size) + spare
    blocks = rows * per_row + 2
    cache_dtype = cache_dtype or dtype
    kv = torch.full((2, blocks, block_size, kv_heads, dim), math.nan, device="cuda")
    table = torch.randperm(blocks, device="cuda")[: rows * per_row].view(rows, per_row).int()
    for row, n in enumerate(lengths):
        token = torch.arange(n, device="cuda")
        block, slot = table[row, token // block_size].long(), token % block_size
        kv[:, block, slot] = torch.randn(2, n, kv_heads, dim, device="cuda")
    kv = kv.to(cache_dtype)
    shape = (
        (rows, kv_heads * group, dim) if tokens is None else (rows, tokens, kv_heads * group, dim)
    )
    q = (torch.randn(shape, device="cuda") * contrast).to(dtype)
    options = {"scale": dim**-0.5, "page_size": page_size, "softcap": softcap}
    if sinks:
        options["sinks"] = torch.randn(kv_heads * group, device="cuda")
    lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    return GpuCase((q, kv[0], kv[1], table, lens), options, page_size, list(lengths))


def poison_allocator(nbytes=1 << 28):
    """What the kernels allocate next, uninitialised, holds NaN."""
    torch.full((nbytes // 4,), math.nan, device="cuda")
    torch.cuda.synchronize()


def error(got, expected):
    """Relative Frobenius error."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())
