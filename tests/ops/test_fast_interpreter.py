"""The tests' faster interpreter computes what NumPy does."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are compiled here", allow_module_level=True)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _reduce(x_ptr, out_ptr, AXIS: tl.constexpr, KEPT: tl.constexpr):
    row, column = tl.arange(0, 4)[:, None], tl.arange(0, 8)[None, :]
    x = tl.load(x_ptr + row * 8 + column)
    out = tl.reduce(x, AXIS, _larger)
    tl.store(out_ptr + tl.arange(0, KEPT), out)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_reduction_by_a_function_of_the_kernel(axis, dtype):
    x = torch.randn(4, 8).to(dtype)
    x[2, 5] = torch.nan
    kept = x.shape[1 - axis]
    out = torch.empty(kept, dtype=dtype)
    _reduce[(1,)](x, out, axis, kept)
    torch.testing.assert_close(out, x.amax(axis), rtol=0, atol=0, equal_nan=True)
    assert out.isnan().sum() == 1
