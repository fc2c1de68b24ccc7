"""The guard of all other tests: memory that nobody has written holds no plausible number."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unwritten_memory_is_not_a_number(dtype):
    like = torch.zeros(3, 4, dtype=dtype)
    for made in (
        torch.empty(5, dtype=dtype),
        torch.empty((2, 3), dtype=dtype, requires_grad=True),
        torch.empty_like(like),
        torch.empty_strided((2, 3), (4, 1), dtype=dtype),
        like.new_empty(3),
        like.new_empty_strided((2, 2), (2, 1)),
    ):
        assert made.dtype == dtype and made.isnan().all()
    assert (torch.empty(4, dtype=torch.int32) > 2**20).all()


def test_a_device_context_and_a_compiled_graph_still_allocate():
    with torch.device("meta"):
        assert torch.empty(3).is_meta
    compiled = torch.compile(
        lambda x: torch.empty_like(x).copy_(x), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(torch.ones(3)), torch.ones(3))
