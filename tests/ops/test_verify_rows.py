"""Rows of several new tokens (R10): each token as if it were decoded alone."""

import math
from dataclasses import replace

import pytest
import torch
from ops_oracle import BACKENDS, close, make_case, needs_triton, pack, poison_outside, select

from deltadecode import ops
from deltadecode.config import DeltaConfig
from deltadecode.errors import OperationError
from deltadecode.ops import dispatch

backends = pytest.mark.parametrize("backend", BACKENDS)
CFG = DeltaConfig(page_size=4, budget_pages=3, recent_pages=1, sink_pages=1)


def verify_case(seed, lengths, tokens, **options):
    """A case whose q is [B, Q, Hq, D]."""
    case = make_case(seed, lengths, **options)
    rng = torch.Generator().manual_seed(seed)
    shape = (len(lengths), tokens, *case.q.shape[1:])
    return replace(case, q=(torch.randn(shape, generator=rng) * 2).to(case.q.dtype))


def alone(case):
    """For each of the Q tokens the case of its rows, which end with it."""
    tokens = case.q.shape[1]
    cut = [[max(0, len(k) - tokens + 1 + j) for k in case.keys] for j in range(tokens)]
    return [
        replace(
            case, q=case.q[:, j],
            keys=[k[:n] for k, n in zip(case.keys, cut[j], strict=True)],
            values=[v[:n] for v, n in zip(case.values, cut[j], strict=True)],
        )
        for j in range(tokens)
    ]  # fmt: skip


def expected_step(case, cfg=CFG):
    """Output, scores and pages of a Δ-layer, and output of a sparse layer, by the slow rules."""
    full, pages, sparse = [], [], []
    for one in alone(case):
        full.append(one.attend())
        pages.append(
            [
                select(row, n, cfg.page_size, cfg.budget_pages, cfg.recent_pages, cfg.sink_pages)
                for row, n in zip(full[-1][1].tolist(), one.seq_lens.tolist(), strict=True)
            ]
        )
        sparse.append(one.attend(pages[-1])[0])
    out, scores = (torch.stack(each, 1) for each in zip(*full, strict=True))
    return out, scores, pages, torch.stack(sparse, 1)


def step(case, backend, cfg=CFG):
    out, scores = ops.decode_attention(
        *case.arguments, **case.options, return_page_scores=True, backend=backend
    )
    ids, counts = ops.select_pages(scores, case.seq_lens, cfg, backend=backend)
    sparse = ops.decode_attention(
        *case.arguments, **case.options, page_ids=ids, page_counts=counts, backend=backend
    )
    return out, scores, ids, counts, sparse


def check(case, backend, cfg=CFG):
    exact = torch.promote_types(case.q.dtype, torch.float32)
    out, scores, ids, counts, sparse = step(case, backend, cfg)
    rows, tokens = case.q.shape[:2]
    assert out.shape == sparse.shape == case.q.shape and out.dtype == case.q.dtype
    assert scores.shape == (rows, tokens, case.pages) and scores.dtype == exact
    assert ids.shape == (rows, tokens, cfg.table_width(case.pages))
    assert counts.shape == (rows, tokens) and ids.dtype == counts.dtype == torch.int32
    expected, expected_scores, pages, expected_sparse = expected_step(case, cfg)
    close(out, expected, case.q.dtype)
    close(scores, expected_scores, exact)
    dense = ops.decode_attention(*case.arguments, **case.options, backend=backend)
    close(dense, expected, case.q.dtype)
    for j in range(tokens):
        found = zip(ids[:, j].tolist(), counts[:, j].tolist(), strict=True)
        assert [row[:count] for row, count in found] == pages[j]
    close(sparse, expected_sparse, case.q.dtype)


@backends
@pytest.mark.parametrize("layout", ["paged", "interleaved", "rows", "heads", "strided"])
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_rule10_each_token_as_if_it_were_decoded_alone(backend, tokens, layout):
    # Of rows around the budget of 12 tokens, some tokens select pages and others read them all.
    check(verify_case(1, [22, 9, 13, 14, 35], tokens, pages_per_block=2, layout=layout), backend)


@backends
@pytest.mark.parametrize(
    ("kv_heads", "group", "tokens"), [(2, 1, 5), (1, 7, 4), (2, 8, 5), (1, 5, 9)]
)
def test_rule10_groups_of_heads_beside_tokens(backend, kv_heads, group, tokens):
    check(verify_case(2, [30, 17], tokens, kv_heads=kv_heads, group=group, sinks=True), backend)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rule10_sinks_softcap_and_types(backend, dtype):
    case = verify_case(3, [31, 18, 12], 4, sinks=True, softcap=3.0, dtype=dtype, group=3, dim=8)
    if dtype == torch.float32:
        check(case, backend)
        return
    out, scores = ops.decode_attention(
        *case.arguments, **case.options, return_page_scores=True, backend=backend
    )
    expected, expected_scores, _, _ = expected_step(case)
    close(out, expected, dtype)
    close(scores, expected_scores, torch.float32)


@backends
def test_rule10_a_later_draft_never_reaches_an_earlier_token(backend):
    case = verify_case(4, [25, 18, 3], 4, pages_per_block=2)
    want = step(case, backend)
    for back in range(3):
        for row, keys in enumerate(case.keys):
            at = case.slot(row, len(keys) - 1 - back)
            case.k_cache[at] = case.v_cache[at] = math.nan
        earlier = slice(0, 3 - back)
        for found, before in zip(step(case, backend), want, strict=True):
            torch.testing.assert_close(found[:, earlier], before[:, earlier])


@backends
def test_rule5_each_token_reads_its_own_pages(backend):
    case = verify_case(5, [40, 29], 3)
    pages = [[[0, 3, 9], [0, 6]], [[1, 2, 9], [2, 6]], [[5, 6, 9], [0, 7]]]
    packed = [pack(each, 4) for each in pages]
    ids, counts = (torch.stack(each, 1) for each in zip(*packed, strict=True))
    expected = torch.stack(
        [one.attend(chosen)[0] for one, chosen in zip(alone(case), pages, strict=True)], 1
    )
    union = [sorted({p for token in pages for p in token[row]}) for row in range(2)]
    poison_outside(case, union, math.nan)
    out = ops.decode_attention(
        *case.arguments, **case.options, page_ids=ids, page_counts=counts, backend=backend
    )
    close(out, expected, torch.float32)


@backends
def test_rule1_a_prompts_last_tokens_attend_to_everything(backend):
    case = verify_case(6, [40, 29], 3)
    expected, _, pages, sparse = expected_step(case)
    packed = [pack(each, 3) for each in pages]
    ids, counts = (torch.stack(each, 1) for each in zip(*packed, strict=True))
    counts[1], sparse[1] = -1, expected[1]
    out = ops.decode_attention(
        *case.arguments, **case.options, page_ids=ids, page_counts=counts, backend=backend
    )
    close(out, sparse, torch.float32)


@backends
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4])
def test_rows_shorter_than_their_tokens_do_no_harm(backend, length):
    case = verify_case(7, [length, 21], 4, pages_per_block=2)
    case.block_table[0, -(-length // 8) :] = 10**6
    check(case, backend)
    out, scores, _, counts, sparse = step(case, backend)
    missing = slice(0, 4 - length)
    for found in (out, scores, counts, sparse):
        assert not found[0, missing].any()


@backends
def test_rule6_rows_are_independent_of_their_neighbours(backend):
    lengths = [40, 3, 17, 0, 22]
    case = verify_case(8, lengths, 4, pages_per_block=2)
    together = step(case, backend)
    for row in range(len(lengths)):
        for one, many in zip(step(case.row(row), backend), together, strict=True):
            torch.testing.assert_close(one[0], many[row], rtol=2e-6, atol=2e-6)


@backends
@pytest.mark.parametrize(("kv_heads", "group"), [(2, 4), (1, 7)])
def test_long_rows_of_drafts_agree_with_float64(backend, kv_heads, group):
    """Past every chunk and split of a backend, and in turns where logits do not fit at once."""
    case = verify_case(
        9, [1801, 2048, 517], 4, page_size=16, pages_per_block=4, kv_heads=kv_heads, group=group,
        dim=16, sinks=True,
    )  # fmt: skip
    cfg = DeltaConfig()
    out, scores, ids, counts, sparse = step(case, backend, cfg)
    case.q, case.k_cache, case.v_cache = (t.double() for t in (case.q, case.k_cache, case.v_cache))
    expected, expected_scores, expected_ids, expected_counts, expected_sparse = step(
        case, "reference", cfg
    )
    close(out, expected, torch.float32)
    assert torch.allclose(scores.double(), expected_scores, rtol=1e-4, atol=1e-9)
    assert torch.equal(ids, expected_ids) and torch.equal(counts, expected_counts)
    close(sparse, expected_sparse, torch.float32)


@needs_triton
def test_drafts_whose_logits_do_not_fit_at_once(monkeypatch):
    monkeypatch.setattr(dispatch.triton_backend(), "_LOGITS_BYTES", 16)
    check(verify_case(10, [17, 9, 30, 1, 12, 25], 3, sinks=True), "triton")


@backends
def test_queries_of_drafts_may_be_strided(backend):
    case = verify_case(11, [21, 16], 3, group=3)
    wide = torch.full((2, 3, 9, 8, 6), math.nan)
    wide[:, :, :6, :4, 0] = case.q
    case.q = wide[:, :, :6, :4, 0]
    assert not case.q.is_contiguous()
    check(case, backend)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_step_with_drafts_compiles_into_one_graph(backend):
    case = verify_case(12, [21, 2, 13], 3)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = compiled(case, backend), step(case, backend)
    assert all(torch.equal(got, want) for got, want in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(2, 0, 4, 4)}, ("[B, Q, Hq, D]", "[2, 0, 4, 4]")),
        ({"page_ids": torch.zeros(2, 1).int()}, (r"page_ids must be [B, Q, pages]", "[2, 1]")),
        ({"page_ids": torch.zeros(2, 2, 1).int()}, ("page_ids", "int32 [2, 3, 1]", "[2, 2, 1]")),
        ({"page_counts": torch.zeros(2).int()}, ("page_counts", "int32 [2, 3]", "[2]")),
    ],
)
def test_shapes_that_do_not_fit_the_drafts_are_refused(change, words):
    case = verify_case(13, [9, 5], 3, poison=0.0)
    names = ("q", "k_cache", "v_cache", "block_table", "seq_lens")
    arguments = dict(zip(names, case.arguments, strict=True), **case.options)
    if "q" not in change:
        pages = {"page_ids": torch.zeros(2, 3, 1).int(), "page_counts": torch.ones(2, 3).int()}
        arguments |= pages
    with pytest.raises(OperationError) as error:
        ops.decode_attention(**{**arguments, **change})
    for word in words:
        assert word in str(error.value), error.value


@pytest.mark.parametrize("tokens", [1, 2, 5, 9])
@backends
def test_only_the_last_token_of_a_row_is_scored(backend, tokens):
    case = verify_case(3, [70, 9, 41, 0, 5], tokens, kv_heads=2, group=3)
    out, scores = ops.decode_attention(
        *case.arguments, **case.options, return_page_scores=True, backend=backend
    )
    same, last = ops.decode_attention(
        *case.arguments, **case.options, return_page_scores=True, score_last=True, backend=backend
    )
    assert torch.equal(same, out)
    assert torch.equal(last, scores[:, -1])
