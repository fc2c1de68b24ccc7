"""decode_attention in the types of q and of the cache: long rows, halves and 8 bits."""

import math

import pytest
import torch
from attention_checks import check, full, refused, sparse
from ops_oracle import BACKENDS, LAYOUTS, close, make_case, pack, select

from deltadecode import ops
from deltadecode.config import DeltaConfig
from deltadecode.ops import torch as torch_backend

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
SIZES = [(1, 1, 1), (1, 2, 7), (1, 1, 4), (2, 2, 2), (3, 8, 1), (2, 1, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["paged", "heads"])
@pytest.mark.parametrize(("rows", "kv_heads", "group"), SIZES)
def test_long_sequences_agree_with_float64(backend, rows, kv_heads, group, layout, dtype):
    """Lengths past every chunk and split of a backend; the oracle is too slow, float64 is not."""
    lengths = [2305, 4096, 517][:rows]
    case = make_case(
        14, lengths, page_size=16, pages_per_block=4, kv_heads=kv_heads, group=group, dim=16,
        layout=layout, dtype=dtype, sinks=True,
    )  # fmt: skip
    if refused(case, backend):
        return
    out, scores, dense = full(case, backend)
    pages = [list(range(1, -(-n // 16), 2)) for n in lengths]
    picked = sparse(case, pages, backend)
    case.q, case.k_cache, case.v_cache = (t.double() for t in (case.q, case.k_cache, case.v_cache))
    expected, expected_scores, _ = full(case, "reference")
    close(out, expected, dtype)
    close(dense, expected, dtype)
    close(picked, sparse(case, pages, "reference"), dtype)
    assert (scores - expected_scores).abs().max() < 1e-5
    scores_match = torch.allclose(scores.double(), expected_scores, rtol=1e-4, atol=1e-9)
    assert scores_match


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_cache_of_8_bits_with_scales(backend, dtype, layout):
    """As if the stored numbers times their scale stood in a cache of the type of q."""
    case = make_case(21, [22, 9, 0, 30], pages_per_block=2, dtype=dtype, sinks=True, layout=layout)
    exact = [t.to(torch.float8_e4m3fn) for t in (case.k_cache, case.v_cache)]
    rounded = [t.float() * s for t, s in zip(exact, (0.5, 2.0), strict=True)]
    pages = [[0, 2, 5], [1], [], [1, 2, 7]]
    case.q, q = case.q.float(), case.q
    case.k_cache, case.v_cache = rounded
    expected, expected_scores, _ = full(case, "reference")
    expected_sparse = sparse(case, pages, "reference")
    case.q, (case.k_cache, case.v_cache) = q, exact
    more = {"k_scale": 0.5, "v_scale": 2.0, "backend": backend}
    out, scores = ops.decode_attention(
        *case.arguments, **case.options, return_page_scores=True, **more
    )
    close(out, expected.double(), dtype)
    close(scores, expected_scores.double(), torch.float32)
    ids, counts = pack(pages, 4)
    out = ops.decode_attention(
        *case.arguments, **case.options, page_ids=ids, page_counts=counts, **more
    )
    close(out, expected_sparse.double(), dtype)


def quantized(case, dtype, name):
    """One cache of a case as numbers of 8 bits, and scales: NaN where no token is."""
    cache = getattr(case, name)
    most = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}[dtype]
    scales = (cache.float().abs().amax(dim=3) / most).bfloat16()
    over = cache.float() / scales[..., None].float()
    if dtype == torch.int8:
        over = over.nan_to_num(nan=77.0).round()
    stored = over.clamp(-most, most).to(dtype)
    setattr(case, name, torch.empty_strided(cache.shape, cache.stride(), dtype=dtype).copy_(stored))
    apart = torch.full((*scales.shape[:2], 3 * scales.shape[2]), math.nan, dtype=scales.dtype)
    return apart[..., ::3].copy_(scales)


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cache_of_8_bits_with_a_scale_of_each_token_and_head(backend, dtype, layout, stored):
    """As if the stored numbers times their scales stood in a cache of float32."""
    case = make_case(21, [22, 9, 0, 30], pages_per_block=2, dtype=dtype, sinks=True, layout=layout)
    given = case.k_cache.clone()
    scales = [quantized(case, stored, name) for name in ("k_cache", "v_cache")]
    exact, q = (case.k_cache, case.v_cache), case.q
    pages = [[0, 2, 5], [1], [], [1, 2, 7]]
    ids, counts = pack(pages, 4)
    selected = {"page_ids": ids, "page_counts": counts}
    case.q = q.float()
    case.k_cache, case.v_cache = (
        cache.float() * s[..., None].float() for cache, s in zip(exact, scales, strict=True)
    )
    off = (case.k_cache - given.float()).abs().nan_to_num()
    assert 0 < off.max() < 0.1
    expected, expected_scores, _ = full(case, "reference")
    expected_sparse = sparse(case, pages, "reference")
    case.q, (case.k_cache, case.v_cache) = q, exact
    more = {"k_scales": scales[0], "v_scales": scales[1], "backend": backend}
    out, page_scores = ops.decode_attention(
        *case.arguments, **case.options, return_page_scores=True, **more
    )
    close(out, expected.double(), dtype)
    close(page_scores, expected_scores.double(), torch.float32)
    out = ops.decode_attention(*case.arguments, **case.options, **selected, **more)
    close(out, expected_sparse.double(), dtype)
    # A padding row may be shorter than the number of its queries.
    case.q = torch.stack([q, q], dim=1)
    out = ops.decode_attention(*case.arguments, **case.options, **more)
    close(out[:, 1], expected.double(), dtype)


@pytest.mark.parametrize("layout", ["paged", "heads"])
def test_half_precision_chooses_the_pages_of_float64(backend, layout):
    """Logits rounded to bfloat16 would order the pages otherwise."""
    lengths = [3000, 2500]
    case = make_case(
        15, lengths, page_size=16, pages_per_block=2, group=7, dim=32, dtype=torch.bfloat16,
        layout=layout,
    )  # fmt: skip
    cfg = DeltaConfig()
    _, scores, _ = full(case, backend)
    ids, _ = ops.select_pages(scores, case.seq_lens, cfg, backend=backend)
    case.q, case.k_cache, case.v_cache = (t.double() for t in (case.q, case.k_cache, case.v_cache))
    _, exact, _ = full(case, "reference")
    expected = [
        select(row, n, 16, cfg.budget_pages, cfg.recent_pages, 0)
        for row, n in zip(exact.tolist(), lengths, strict=True)
    ]
    assert ids.tolist() == expected


def test_a_large_half_precision_batch(backend, monkeypatch):
    """Long rows are converted one by one; small ones stand in for them here."""
    monkeypatch.setattr(torch_backend, "_UPCAST_ELEMENTS", 64)
    for dtype in (torch.bfloat16, torch.float32):
        case = make_case(16, [17, 17, 17], layout="heads", dtype=dtype, sinks=True, softcap=3.0)
        check(case, backend)
