"""The Triton kernels on a GPU, against float64: run with ``pytest -m gpu``."""

import math

import pytest
import torch
from gpu_cases import error, make_gpu_case, poison_allocator

from deltadecode import ops
from deltadecode.config import DeltaConfig
from deltadecode.ops import DecodeInputs, Scratch, plan_decode

pytestmark = pytest.mark.gpu
# Rounding of the output, and of the weights before they meet the values.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 2e-6}
RAGGED = [1, 15, 16, 17, 1023, 1024, 1025, 2500, 5000]


def check(case, dtype):
    poison_allocator()
    out, scores = case.run(return_page_scores=True)
    expected, expected_scores = case.exact(return_page_scores=True)
    assert error(out, expected) < TOLERANCE[dtype]
    assert error(case.run(), expected) < TOLERANCE[dtype]
    # Float32 whatever the input is.
    assert error(scores, expected_scores) < 5e-6
    cfg = DeltaConfig(page_size=case.page_size, budget_pages=64 if case.page_size > 4 else 300)
    ids, counts = ops.select_pages(scores, case.arguments[4], cfg, backend="triton")
    same = ops.select_pages(scores, case.arguments[4], cfg, backend="reference")
    assert torch.equal(ids, same[0]) and torch.equal(counts, same[1])
    counts[1::4] = -1  # every page
    _check_sparse(case, dtype, ids, counts)
    # A share of the long rows, K pages of the short ones; lists of more than 512 pages in parts.
    cfg = DeltaConfig(page_size=case.page_size, budget_pages=10, budget_share=0.4)
    ids, counts = ops.select_pages(scores, case.arguments[4], cfg, backend="triton")
    same = ops.select_pages(scores, case.arguments[4], cfg, backend="reference")
    assert torch.equal(ids, same[0]) and torch.equal(counts, same[1])
    _check_sparse(case, dtype, ids, counts)


def _check_sparse(case, dtype, ids, counts):
    poison_allocator()
    sparse = case.run(page_ids=ids, page_counts=counts)
    assert error(sparse, case.exact(page_ids=ids, page_counts=counts)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_head_sizes(dim, dtype):
    check(make_gpu_case(RAGGED, dim=dim, dtype=dtype), dtype)


@pytest.mark.parametrize(("kv_heads", "group"), [(8, 1), (2, 2), (8, 4), (4, 7), (1, 8), (1, 16)])
def test_group_sizes(kv_heads, group):
    check(make_gpu_case(RAGGED, kv_heads=kv_heads, group=group), torch.bfloat16)


@pytest.mark.parametrize(
    ("page", "block"), [(1, 16), (8, 16), (16, 48), (32, 64), (64, 64), (12, 24)]
)
def test_page_and_block_sizes(page, block):
    check(make_gpu_case(RAGGED, page_size=page, block_size=block), torch.bfloat16)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sinks_and_softcap(softcap):
    check(make_gpu_case(RAGGED, sinks=True, softcap=softcap), torch.bfloat16)


@pytest.mark.parametrize(
    ("kv_heads", "group", "tokens"), [(2, 6, 4), (8, 4, 4), (4, 8, 6), (1, 16, 3), (2, 2, 2)]
)
def test_rule10_drafts(kv_heads, group, tokens):
    check(make_gpu_case(RAGGED, kv_heads=kv_heads, group=group, tokens=tokens), torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 64, 128])
def test_batches(rows):
    lengths = [(37 * row) % 3000 + 1 for row in range(rows)]
    check(make_gpu_case(lengths), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_cache(dtype):
    case = make_gpu_case(RAGGED, dtype=dtype, cache_dtype=torch.float8_e4m3fn)
    case.options |= {"k_scale": 0.7, "v_scale": 1.3}
    check(case, dtype)


@pytest.mark.parametrize("tokens", [None, 3])
def test_fp8_queries_of_a_plan(tokens):
    """As vLLM has them: exactly what the same numbers in float16 give, in bfloat16."""
    case = make_gpu_case(
        RAGGED, dtype=torch.float16, cache_dtype=torch.float8_e4m3fn, tokens=tokens
    )
    q, k, v, table, lens = case.arguments
    q = q.to(torch.float8_e4m3fn)
    case.arguments = (q.half(), k, v, table, lens)
    case.options |= {"k_scale": 0.7, "v_scale": 1.3}
    expected, scores = case.run(return_page_scores=True)
    config = DeltaConfig(page_size=16, budget_pages=8, recent_pages=2, sink_pages=1)
    ids, counts = ops.select_pages(scores, lens, config)
    out = torch.empty(q.shape, dtype=torch.bfloat16, device="cuda")
    more = {"k_scale": 0.7, "v_scale": 1.3}
    whole, sparse = (
        DecodeInputs(out, k, v, table, lens, case.options["scale"], 16, **more, **pages)
        for pages in ({"return_page_scores": True}, {"page_ids": ids, "page_counts": counts})
    )
    plan = plan_decode(whole, config, 0, q.dtype)
    found = plan.run(q, k, v, table, lens, None, out, Scratch())
    assert error(out, expected) < 5e-3
    assert all(torch.equal(a, b) for a, b in zip(found, (ids, counts), strict=True))
    plan_decode(sparse, None, 0, q.dtype).run(
        q, k, v, table, lens, None, out, Scratch(), ids, counts
    )
    assert error(out, case.run(page_ids=ids, page_counts=counts)) < 5e-3


def test_a_long_row():
    check(make_gpu_case([131072, 5], kv_heads=2, group=6), torch.bfloat16)


def test_repeated_runs_are_equal():
    case = make_gpu_case(RAGGED)
    first = case.run(return_page_scores=True)
    for _ in range(20):
        poison_allocator()
        again = case.run(return_page_scores=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_row_does_not_depend_on_the_others():
    case = make_gpu_case(RAGGED)
    out, scores = case.run(return_page_scores=True)
    q, k, v, table, lens = case.arguments
    other = lens.clone()
    other[1:] = 3
    case.arguments = (q, k, v, table, other)
    out_again, scores_again = case.run(return_page_scores=True)
    assert torch.equal(out[0], out_again[0]) and torch.equal(scores[0], scores_again[0])


@pytest.mark.parametrize("pages", [65, 2048, 4096, 5000, 65536])
def test_selection_is_exact(pages):
    torch.manual_seed(pages)
    scores = torch.rand(16, pages, device="cuda")
    scores[1] = (scores[1] * 8).floor()
    scores[2, ::3] = math.nan
    scores[3] = 0.0
    scores[4] = -scores[4]
    scores[5, 7] = math.inf
    lens = torch.randint(1, pages * 16, (16,), dtype=torch.int32, device="cuda")
    lens[:6] = pages * 16
    plans = [{}, {"sink_pages": 0}, {"budget_pages": 10}]
    plans += [{"budget_share": share} for share in (0.01, 0.1, 0.6)]
    for cfg in (DeltaConfig(**plan) for plan in plans):
        got = ops.select_pages(scores, lens, cfg, backend="triton")
        want = ops.select_pages(scores, lens, cfg, backend="reference")
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("longest", [5000, 40000])
def test_a_cuda_graph_follows_lengths_and_pages(longest, share):
    """One capture, replayed across the budget: nothing of a step is frozen into it."""
    case = make_gpu_case([longest, longest])
    cfg = DeltaConfig(budget_share=share)
    lens = case.arguments[4]

    def step():
        out, scores = case.run(return_page_scores=True)
        ids, counts = ops.select_pages(scores, lens, cfg, backend="triton")
        return out, ids, counts, case.run(page_ids=ids, page_counts=counts)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths in ([1, 1024], [1025, longest], [longest - 1, 17], [2561, 2560]):
        lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        again = [tensor.clone() for tensor in captured]
        assert all(torch.equal(a, b) for a, b in zip(again, step(), strict=True))
