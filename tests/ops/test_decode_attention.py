"""decode_attention against the rules: R2, R3, R5, R6, R7."""

import math

import pytest
import torch
from attention_checks import check, full, refused, sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_oracle import BACKENDS, LAYOUTS, close, make_case, pack, poison_outside, select

from deltadecode import ops
from deltadecode.config import DeltaConfig
from deltadecode.ops import dispatch

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rule2_scores_sum_the_largest_weight_of_any_head(backend, layout):
    check(make_case(1, [13], kv_heads=2, group=3, layout=layout), backend)


def test_rule2_by_hand(backend):
    case = make_case(0, [3], page_size=2, kv_heads=1, group=2, dim=2, layout="rows")
    case.k_cache[0, :3, 0] = torch.tensor([[0.0, 0.0], [math.log(2), 0.0], [0.0, math.log(5)]])
    case.v_cache[0, :3, 0] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [4.0, 4.0]])
    case.q[0] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    case.scale = 1.0
    out, scores, _ = full(case, backend)
    # Weights: head 0 (1, 2, 1)/4, head 1 (1, 1, 5)/7.
    torch.testing.assert_close(scores[0, :2], torch.tensor([1 / 4 + 1 / 2, 5 / 7]))
    torch.testing.assert_close(out[0], torch.tensor([[5 / 4, 6 / 4], [21 / 7, 21 / 7]]))


def test_rule2_pages_past_the_last_token_score_zero(backend):
    case = make_case(2, [5, 0, 16], pages_per_block=2)
    _, scores, _ = full(case, backend)
    assert scores.shape == (3, 6)
    assert (scores[0, :2] > 0).all() and (scores[0, 2:] == 0).all()
    assert (scores[1] == 0).all()
    assert (scores[2, :4] > 0).all() and (scores[2, 4:] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [1, 3, 4, 5, 19, 20])
def test_rule3_sparse_equals_full_when_all_pages_fit(backend, n, layout):
    case = make_case(n, [n], layout=layout)
    _, scores, dense = full(case, backend)
    cfg = DeltaConfig(page_size=4, budget_pages=5, recent_pages=2)
    ids, counts = ops.select_pages(scores, case.seq_lens, cfg, backend=backend)
    out = ops.decode_attention(
        *case.arguments, **case.options, page_ids=ids, page_counts=counts, backend=backend
    )
    close(out, dense.double(), torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rule5_softmax_over_the_selected_tokens_only(backend, layout):
    case = make_case(3, [22, 30], pages_per_block=2, layout=layout)
    pages = [[0, 2, 5], [1, 2, 3, 6, 7]]
    expected, _ = case.attend(pages)
    close(sparse(case, pages, backend, width=7), expected, torch.float32)


@pytest.mark.parametrize(("page_size", "splits"), [(1, True), (3, False), (4, False), (64, True)])
def test_rule5_lists_of_pages_that_are_read_in_parts(backend, page_size, splits, monkeypatch):
    """As the Triton backend does where a share of long rows may be selected."""
    if dispatch.triton_backend() is not None:
        from deltadecode.ops.triton import launch, plans

        # Plans of other tests are of shapes as they were.
        monkeypatch.setattr(dispatch.triton_backend(), "attention_plan", plans.AttentionPlan)
        monkeypatch.setattr(launch, "_LISTED", 4)
        monkeypatch.setattr(launch, "_WHOLE_LIST", 4)
        if not splits:  # a thread block then reads several parts
            shape = launch.attention_shape.__wrapped__
            monkeypatch.setattr(plans, "attention_shape", lambda *key: (shape(*key)[0], 1))
    lengths = [389, 573, 2, 300]
    case = make_case(19, lengths, page_size=page_size, dim=4)
    cfg = DeltaConfig(page_size, 3, 1, 1, budget_share=0.8)
    _, scores, _ = full(case, backend)
    ids, counts = ops.select_pages(scores, case.seq_lens, cfg, backend=backend)
    pages = [row[:count] for row, count in zip(ids.tolist(), counts.tolist(), strict=True)]
    expected, _ = case.attend(pages)
    poison_outside(case, pages, math.nan)
    out = ops.decode_attention(
        *case.arguments, **case.options, page_ids=ids, page_counts=counts, backend=backend
    )
    close(out, expected, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e38])
def test_rule5_what_is_not_selected_never_reaches_an_output(backend, poison, layout):
    case = make_case(4, [23, 9, 0], pages_per_block=2, layout=layout, poison=poison)
    check(case, backend)
    pages = [[0, 3, 5], [2], []]
    expected, _ = case.attend(pages)
    poison_outside(case, pages, poison)
    close(sparse(case, pages, backend), expected, torch.float32)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_rule5_what_lies_past_the_count_is_no_page(backend, poison):
    case = make_case(5, [23])
    expected, _ = case.attend([[1, 5]])
    poison_outside(case, [[1, 5]], poison)
    ids = torch.tensor([[1, 5, 0, 10**6, -7]], dtype=torch.int32)
    counts = torch.tensor([2], dtype=torch.int32)
    out = ops.decode_attention(
        *case.arguments, **case.options, page_ids=ids, page_counts=counts, backend=backend
    )
    close(out, expected, torch.float32)


def test_rule5_where_pages_lie_and_how_wide_their_table_is_changes_no_bit(backend):
    # Fewer tokens than the list of pages has room for, and two splits of what it has room for.
    case = make_case(20, [101, 90], page_size=16, dim=16)
    pages = [[0, 2, 3, 4, 5, 6], [1, 2, 4, 5]]
    ids, counts = pack(pages, 8)
    blocks = len(case.k_cache)
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))
    table = case.block_table[:, :7].clamp(0, blocks - 1)
    wide = torch.full((2, 64), blocks, dtype=torch.int32)
    wide[:, :7] = order.argsort()[table]
    nowhere = torch.full_like(case.k_cache[:1], math.nan)
    moved = [torch.cat([x[order], nowhere]) for x in (case.k_cache, case.v_cache)]
    first, second = (
        ops.decode_attention(
            case.q, *caches, where, case.seq_lens, **case.options, page_ids=ids,
            page_counts=counts, backend=backend,
        )
        for caches, where in (((case.k_cache, case.v_cache), table), (moved, wide))
    )  # fmt: skip
    assert torch.equal(first, second)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [[23, 70, 0, 41], [41, 41]])
def test_rule1_a_row_that_counts_minus_one_attends_to_everything(backend, lengths, layout):
    case = make_case(7, lengths, pages_per_block=2, layout=layout, sinks=True)
    pages = [[1, 5], [0, 3], [], [2, 10]][: len(lengths)]
    expected, _ = case.attend(pages)
    everything, _ = case.attend()
    ids, counts = pack(pages, 3)
    for row in (1, len(lengths) - 1):
        ids[row], counts[row] = -1, -1
        expected[row] = everything[row]
    out = ops.decode_attention(
        *case.arguments, **case.options, page_ids=ids, page_counts=counts, backend=backend
    )
    close(out, expected, torch.float32)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9])
def test_rule5_the_last_page_may_be_partial(backend, n):
    case = make_case(n, [n], pages_per_block=3)
    check(case, backend)
    last = [[(n - 1) // 4]]
    expected, _ = case.attend(last)
    close(sparse(case, last, backend), expected, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rule6_rows_are_independent(backend, layout):
    lengths = [1, 17, 0, 40, 16, 3]
    case = make_case(6, lengths, pages_per_block=2, layout=layout, sinks=True)
    out, scores, dense = full(case, backend)
    pages = [[0], [0, 4], [], [1, 3, 9], [0, 1, 2, 3], [0]]
    picked = sparse(case, pages, backend, width=5)
    for row in range(len(lengths)):
        alone = case.row(row)
        got = (*full(alone, backend), sparse(alone, pages[row : row + 1], backend))
        for one, many in zip(got, (out, scores, dense, picked), strict=True):
            torch.testing.assert_close(one[0], many[row], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [[22, 22, 22], [4, 22, 30]])
@pytest.mark.parametrize("pages", [[[0], [1, 2], [5]], [[0], [], [3]], [[0], [2], [3]]])
def test_rule6_rows_with_unlike_pages(backend, pages, lengths, layout):
    case = make_case(18, lengths, layout=layout)
    expected, _ = case.attend(pages)
    close(sparse(case, pages, backend), expected, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [3, 4, 21])
def test_rule6_rows_of_equal_length(backend, n, layout):
    case = make_case(19, [n, n, n], layout=layout)
    check(case, backend)
    case.block_table = case.block_table.flip(0)
    case.keys.reverse()
    case.values.reverse()
    check(case, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rule6_a_row_that_starts_inside_its_block(backend, layout):
    """A left-padded row is a view of the cache that starts later."""
    case = make_case(7, [21], layout=layout)
    if layout in ("rows", "heads"):
        expected, expected_scores = case.attend()
        grown = [torch.cat([torch.full_like(c[:, :4], math.nan), c], 1) for c in
                 (case.k_cache, case.v_cache)]  # fmt: skip
        if layout == "heads":
            grown = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in grown]
        case.k_cache, case.v_cache = (g[:, 4:] for g in grown)
        out, scores, _ = full(case, backend)
        close(out, expected, torch.float32)
        close(scores, expected_scores, torch.float32)
        expected, _ = case.attend([[0, 5]])
        close(sparse(case, [[0, 5]], backend), expected, torch.float32)
    else:
        check(case, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", [None, -math.inf, -20.0, 0.0, 30.0])
def test_rule7_sinks_enter_every_denominator(backend, level, layout):
    case = make_case(8, [14, 3], sinks=True, layout=layout)
    if level is not None:
        case.sinks[::2] = level
    check(case, backend)
    expected, _ = case.attend([[0, 3], [0]])
    close(sparse(case, [[0, 3], [0]], backend), expected, torch.float32)


def test_rule7_a_sink_is_no_token(backend):
    case = make_case(9, [9], sinks=True)
    case.sinks[:] = 60.0
    out, scores, _ = full(case, backend)
    assert out.abs().max() < 1e-15 and scores.max() < 1e-15
    assert sparse(case, [[1]], backend).abs().max() < 1e-15


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sinks", [False, True])
def test_rule7_softcap_comes_after_the_scale(backend, sinks, layout):
    case = make_case(10, [14, 6], softcap=0.7, sinks=sinks, contrast=8.0, layout=layout)
    check(case, backend)
    expected, _ = case.attend([[0, 2], [1]])
    close(sparse(case, [[0, 2], [1]], backend), expected, torch.float32)


def test_logits_that_overflow_exp(backend):
    case = make_case(11, [20], contrast=900.0)
    check(case, backend)
    expected, _ = case.attend([[1, 3]])
    close(sparse(case, [[1, 3]], backend), expected, torch.float32)


def test_inputs_stay_as_they_are(backend):
    case = make_case(12, [9, 2], sinks=True, softcap=2.0, poison=7.0)
    tensors = [*case.arguments, case.sinks]
    before = [t.clone() for t in tensors]
    full(case, backend)
    sparse(case, [[0, 2], [0]], backend)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize(("after_head", "after_block"), [(1, 2), (0, 1), (0, 4)])
def test_heads_and_blocks_that_lie_apart(backend, after_head, after_block):
    """Gaps, in tokens, between heads and between blocks: not always whole pages."""
    case = make_case(20, [22, 22], layout="heads")
    for name in ("k_cache", "v_cache"):
        cache = getattr(case, name)
        blocks, size, heads, dim = cache.shape
        by_head = (size + after_head) * dim
        by_block = by_head * heads + after_block * dim
        apart = torch.full((blocks * by_block,), math.nan)
        apart = apart.as_strided(cache.shape, (by_block, dim, by_head, 1))
        setattr(case, name, apart.copy_(cache))
    check(case, backend)
    for pages in ([[0, 5], [2, 3]], [[0, 1, 5], [4]]):
        expected, _ = case.attend(pages)
        close(sparse(case, pages, backend), expected, torch.float32)


def test_no_rows_no_tokens_no_blocks(backend):
    case = make_case(13, [0, 0])
    out, scores, dense = full(case, backend)
    assert not out.any() and not scores.any() and not dense.any()
    assert not sparse(case, [[], []], backend).any()
    case.k_cache, case.v_cache = case.k_cache[:0], case.v_cache[:0]
    out, scores, dense = full(case, backend)
    assert not out.any() and not scores.any() and not dense.any()
    case.block_table = case.block_table[:, :0]
    assert full(case, backend)[1].shape == (2, 0)
    assert not sparse(case, [[], []], backend).any()
    case.q, case.keys, case.block_table = case.q[:0], [], case.block_table[:0]
    assert full(case, backend)[0].shape == (0, 4, 4)


def test_rows_whose_logits_do_not_fit_at_once(backend, monkeypatch):
    """The Triton backend then takes some rows at a time."""
    case = make_case(18, [17, 9, 30, 1, 12, 25], layout="paged", sinks=True)
    kernels = dispatch.triton_backend()
    if kernels is not None:
        monkeypatch.setattr(kernels, "_LOGITS_BYTES", 16)
    check(case, backend)


def test_queries_may_be_strided(backend):
    case = make_case(17, [9, 6], group=3)
    case.q = torch.stack([case.q, torch.full_like(case.q, math.nan)], dim=3)[..., 0]
    assert not case.q.is_contiguous()
    check(case, backend)


@st.composite
def cases(draw):
    page_size = draw(st.sampled_from([1, 2, 4, 8]))
    budget = draw(st.integers(2, 4))
    p, k = page_size, budget * page_size
    edges = st.sampled_from([0, 1, p - 1, p, p + 1, k, k + 1])
    lengths = draw(st.lists(edges | st.integers(0, 2 * k + p), min_size=1, max_size=3))
    case = make_case(
        draw(st.integers(0, 2**20)),
        lengths,
        page_size=page_size,
        pages_per_block=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 8)),
        dim=draw(st.sampled_from([1, 3, 8])),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(LAYOUTS)),
        sinks=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 1.5, 30.0])),
        poison=draw(st.sampled_from([math.nan, math.inf, -math.inf])),
    )
    return case, budget, draw(st.randoms(use_true_random=False))


@settings(deadline=None)
@given(drawn=cases())
def test_full_attention_equals_the_rules(backend, drawn):
    check(drawn[0], backend)


@settings(deadline=None)
@given(drawn=cases())
def test_sparse_attention_equals_the_rules(backend, drawn):
    case, budget, random = drawn
    if refused(case, backend):
        return
    pages = []
    for n in case.seq_lens.tolist():
        scores = [random.random() for _ in range(case.pages)]
        pages.append(select(scores, n, case.page_size, budget, 1, 0))
    expected, _ = case.attend(pages)
    poison_outside(case, pages, random.choice([math.nan, math.inf]))
    close(sparse(case, pages, backend, width=budget), expected, case.q.dtype)
