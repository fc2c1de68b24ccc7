"""The selection of long rows, which many thread blocks make, against the definition."""

import pytest
import torch
from ops_oracle import needs_triton

from deltadecode import DeltaConfig, ops
from deltadecode.ops import dispatch


@needs_triton
@pytest.mark.parametrize(
    "recent, sinks, page_size, budget",
    [(0, 0, 1, 40), (8, 1, 1, 40), (2, 3, 4, 40), (8, 1, 1, 1200)],
)
def test_long_rows_are_selected_from_as_the_definition_says(
    monkeypatch, recent, sinks, page_size, budget
):
    kernels = dispatch.triton_backend()
    monkeypatch.setattr(kernels, "LONG_ROWS", 100)
    monkeypatch.setattr(kernels, "_WIDE_TILE", 128)
    lengths = [900, 41, 40, 1, 0, 700, 129, 895]
    scores = torch.randn(len(lengths), 900)
    scores[2] = 1.0
    scores[5, 100:600] = 0.25  # ties across tiles
    scores[5, ::7] = -0.0
    scores[6, 3:] = torch.nan
    scores[7] = torch.randint(3, (900,)) * torch.inf - 1.0
    scores[7, :9] = torch.nan
    scores[0] = torch.randn(900) * 1e-6 + 1  # keys that differ in their last digit only
    lens = torch.tensor(lengths, dtype=torch.int32) * page_size
    cfg = DeltaConfig(page_size, budget, recent, sinks)
    made = ops.select_pages(scores, lens, cfg, backend="triton")
    wanted = ops.select_pages(scores, lens, cfg, backend="reference")
    assert torch.equal(made[1], wanted[1])
    assert torch.equal(made[0], wanted[0])
    assert kernels.select_pages(scores[:0], lens[:0], cfg)[0].shape == (0, budget)


@needs_triton
def test_pieces_of_long_rows_find_what_the_definition_says():
    width, lengths = 40_000, [40_000, 33_001, 16_384, 5_000, 2_048, 17, 0]
    scores = torch.randn(len(lengths), width)
    scores[0, 1000:30_000] = scores[0].sort().values[-1500]  # ties across pieces
    scores[1, ::3] = torch.nan
    lens = torch.tensor(lengths, dtype=torch.int32)
    cfg = DeltaConfig(page_size=1, budget_pages=2048, recent_pages=0, sink_pages=0)
    made = ops.select_pages(scores, lens, cfg, backend="triton")
    wanted = ops.select_pages(scores, lens, cfg, backend="reference")
    assert torch.equal(made[1], wanted[1])
    assert torch.equal(made[0], wanted[0])


@needs_triton
def test_rows_are_long_from_where_one_thread_block_would_read_them_in_turns(monkeypatch):
    kernels, called = dispatch.triton_backend(), []
    monkeypatch.setattr(kernels, "_select_wide", lambda *a: called.append(a[0].shape[1]))
    large = DeltaConfig(budget_pages=16_000)  # too many for pieces
    for width, cfg in ((32768, large), (32769, large), (32769, DeltaConfig())):
        kernels.select_pages(torch.zeros(1, width), torch.ones(1, dtype=torch.int32), cfg)
    assert called == [32769]
