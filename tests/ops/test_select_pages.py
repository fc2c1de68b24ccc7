"""select_pages against the rules: R1, R3, R4, R6."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ops_oracle import BACKENDS, select

from deltadecode import ops
from deltadecode.config import DeltaConfig

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
NAN, INF = math.nan, math.inf


def config(page_size=4, budget=5, recent=2, sinks=0, share=0.0):
    return DeltaConfig(page_size, budget, recent, sinks, budget_share=share)


def run(scores, lengths, cfg, backend, dtype=torch.float32):
    """Select, check the contract, and return the pages of each row."""
    scores = torch.tensor(scores, dtype=dtype).reshape(len(lengths), -1)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    before = scores.clone()
    ids, counts = ops.select_pages(scores, seq_lens, cfg, backend=backend)
    assert torch.equal(scores.nan_to_num(7), before.nan_to_num(7)) and seq_lens.tolist() == lengths
    assert ids.dtype == counts.dtype == torch.int32
    width = cfg.table_width(scores.shape[1])
    assert ids.shape == (len(lengths), width) and counts.shape == (len(lengths),)
    assert all(set(row[count:]) <= {-1} for row, count in zip(ids.tolist(), counts, strict=True))
    return [row[:count] for row, count in zip(ids.tolist(), counts.tolist(), strict=True)]


def refused(backend, dtype):
    """Whether a backend does not take scores of a type; it then has to say so."""
    if backend != "triton" or dtype != torch.float64:
        return False
    with pytest.raises(ValueError, match=r"'triton' takes bfloat16, .*, got float64"):
        run([[1.0]], [1], config(), backend, dtype)
    return True


def test_rule1_selection_keeps_no_state(backend):
    cfg = config(page_size=1, budget=3, recent=1)
    first, second = [[9, 0, 0, 8, 0, 0, 0]], [[0, 9, 8, 0, 0, 0, 0]]
    expected = [[0, 3, 6]]
    assert run(first, [7], cfg, backend) == expected
    assert run(second, [7], cfg, backend) == [[1, 2, 6]]
    assert run(first, [7], cfg, backend) == expected


@pytest.mark.parametrize("n", [1, 3, 4, 5, 17, 20])
def test_rule3_every_page_when_they_fit(backend, n):
    pages = -(-n // 4)
    assert run([[NAN, INF, -INF, 0, 1, 9, 9]], [n], config(), backend) == [list(range(pages))]


def test_rule3_one_token_past_the_budget_drops_a_page(backend):
    cfg = config()  # 20 tokens fit
    assert run([[3, 1, 2, 4, 9, 9]], [20], cfg, backend) == [[0, 1, 2, 3, 4]]
    assert run([[3, 1, 2, 4, 9, 9]], [21], cfg, backend) == [[0, 2, 3, 4, 5]]


def test_rule4_recent_pages_whatever_they_score(backend):
    assert run([[1, 2, 3, 4, 5, 6, -INF, NAN]], [32], config(), backend) == [[3, 4, 5, 6, 7]]
    assert run([[1, 2, 3, 4, 5, 6, -9, -9]], [29], config(recent=0), backend) == [[1, 2, 3, 4, 5]]


def test_rule4_sink_pages_whatever_they_score(backend):
    cfg = config(recent=1, sinks=2)
    assert run([[NAN, -INF, 1, 2, 3, 4, 5, 0]], [32], cfg, backend) == [[0, 1, 5, 6, 7]]


def test_rule4_forced_pages_count_once(backend):
    cfg = config(recent=1, sinks=2)
    assert run([[9, 8, 1, 2, 3, 4, 5, 7]], [32], cfg, backend) == [[0, 1, 5, 6, 7]]
    assert run([[9, 1, 8, 2, 3, 4, 5, 7]], [31], cfg, backend) == [[0, 1, 2, 6, 7]]


def test_rule4_ties_go_to_the_lower_page(backend):
    assert run([[1, 1, 1, 1, 1, 1, 1, 1]], [32], config(), backend) == [[0, 1, 2, 6, 7]]
    assert run([[0, 5, 1, 5, 1, 1, 0, 0]], [32], config(), backend) == [[1, 2, 3, 6, 7]]
    assert run([[0.0, -0.0, 0.0, -1, 0, 0, 0, 0]], [32], config(), backend) == [[0, 1, 2, 6, 7]]
    wide = [[1.0] * 300]
    assert run(wide, [1200], config(), backend) == [[0, 1, 2, 298, 299]]


def test_rule4_nan_ranks_below_every_number(backend):
    cfg = config(budget=4, recent=1)
    assert run([[NAN, -INF, 1, NAN, -INF, 0]], [24], cfg, backend) == [[1, 2, 4, 5]]
    assert run([[NAN, NAN, 1, NAN, NAN, 0]], [24], cfg, backend) == [[0, 1, 2, 5]]
    assert run([[NAN, -1, INF, NAN, -INF, 0]], [24], cfg, backend) == [[1, 2, 4, 5]]


def test_rule4_scores_past_the_last_page_play_no_part(backend):
    scores = [[1, 2, 3, 4, 5, 6, INF, NAN, 99]]
    assert run(scores, [24], config(), backend) == [[1, 2, 3, 4, 5]]
    assert run(scores, [23], config(), backend) == [[1, 2, 3, 4, 5]]


def test_rule4_the_budget_grows_with_the_row(backend):
    cfg = config(page_size=1, budget=4, recent=1, sinks=1, share=0.25)
    scores = [[0, 3, 9, 1, 8, 2, 7, 4, 6, 5, 0, 0, 0, 0, 0, 0, 0, 0, NAN, NAN]] * 4
    # Four pages of up to 16, five of 17 to 20; among zeros the lowest.
    assert run(scores, [4, 16, 17, 20], cfg, backend) == [
        [0, 1, 2, 3], [0, 2, 4, 15], [0, 2, 4, 6, 16], [0, 2, 4, 6, 19],
    ]  # fmt: skip
    assert run(scores[:2], [17, 17], cfg, backend) == [[0, 2, 4, 6, 16]] * 2
    # One page more in all backends as soon as the exact share is passed.
    wide = torch.rand(3, 4200).tolist()
    found = run(wide, [4096, 4097, 4200], cfg, backend)
    assert [len(pages) for pages in found] == [1024, 1025, 1050]


def test_rule3_a_share_that_covers_a_short_row(backend):
    cfg = config(page_size=1, budget=1, recent=0, share=0.9)
    assert run([[5, 4, 3, 2, 1, 0]] * 2, [6, 3], cfg, backend) == [[*range(6)], [0, 1, 2]]
    scores = [[*range(12)]] * 2
    assert run(scores, [9, 12], cfg, backend) == [[*range(9)], [*range(1, 12)]]
    cfg = config(page_size=1, budget=1, recent=0, share=1 - 2**-40)
    assert run([[*range(5000)]], [5000], cfg, backend) == [[*range(5000)]]


def test_rule6_rows_are_independent(backend):
    scores = [[5, 4, 3, 2, 1, 0, 0, 0], [NAN] * 8, [0, 0, 9, 0, 9, 9, 0, 0], [INF] * 8]
    lengths = [32, 0, 25, 3]
    together = run(scores, lengths, config(), backend)
    assert together == [[0, 1, 2, 6, 7], [], [0, 2, 4, 5, 6], [0]]
    alone = [run([s], [n], config(), backend)[0] for s, n in zip(scores, lengths, strict=True)]
    assert together == alone


def test_float64_scores_are_not_rounded(backend):
    scores = [[1.0, 1.0 + 1e-12, 1.0 + 2e-12, 0, 0]]
    cfg = config(page_size=1, budget=2, recent=0)
    if not refused(backend, torch.float64):
        assert run(scores, [5], cfg, backend, torch.float64) == [[1, 2]]
    assert run(scores, [5], cfg, backend, torch.float32) == [[0, 1]]


def test_no_rows_and_no_pages(backend):
    ids, counts = ops.select_pages(
        torch.zeros(0, 9), torch.zeros(0, dtype=torch.int32), config(), backend=backend
    )
    assert ids.shape == (0, 5) and counts.shape == (0,)
    assert run([[], []], [0, 0], config(), backend) == [[], []]


def ranked(scores, pages, cfg):
    """Pages that R4 selects from one row [width] of scores, by a stable sort."""
    budget = cfg.pages_for(pages)
    if pages <= budget:
        return list(range(pages))
    forced = {*range(cfg.sink_pages), *range(pages - cfg.recent_pages, pages)}
    order = scores[:pages].nan_to_num(-1.0).sort(descending=True, stable=True).indices
    others = [page for page in order.tolist() if page not in forced]
    return sorted({*forced, *others[: budget - len(forced)]})


@pytest.mark.parametrize("budget", [40, 300, 2050, 4200])
@pytest.mark.parametrize("pages", [4095, 4096, 4097, 9000])
def test_rows_longer_than_a_chunk(backend, pages, budget):
    generator = torch.Generator().manual_seed(pages)
    scores = torch.rand(3, pages, generator=generator)
    scores[1] = (scores[1] * 4).floor()
    scores[2, ::2] = NAN
    cfg = DeltaConfig(page_size=1, budget_pages=budget, recent_pages=3, sink_pages=2)
    lengths = [pages, pages - 1, pages]
    found = run(scores.tolist(), lengths, cfg, backend)
    assert found == [ranked(*row, cfg) for row in zip(scores, lengths, strict=True)]


@pytest.mark.parametrize(
    ("recent", "sinks", "share"),
    [(0, 0, 0.0), (3, 0, 0.0), (0, 2, 0.02), (30, 9, 0.0), (3, 1, 0.3)],
)
def test_rows_of_all_lengths_in_a_wide_table(backend, recent, sinks, share):
    """A long row may be selected from in pieces; each edge of a piece, and each kind of row."""
    generator = torch.Generator().manual_seed(1)
    cfg = config(page_size=1, budget=40, recent=recent, sinks=sinks, share=share)
    lengths = [0, 1, 40, 41, 512, 1024, 1025, 2047, 2048, 2049, 2050, 3072, 3073, 3111, 3112, 3113]
    lengths += [3140, 4096, 6001]
    for levels in (0, 3):
        scores = torch.rand(len(lengths), 6001, generator=generator)
        if levels:  # so that ties lie in several pieces
            scores = (scores * levels).floor()
        found = run(scores.tolist(), lengths, cfg, backend)
        assert found == [ranked(*row, cfg) for row in zip(scores, lengths, strict=True)]
    # All of the best in one piece, the last; and all of one kind everywhere.
    rising = torch.arange(6001.0).expand(2, 6001).clone()
    rising[1] = 7.0
    found = run(rising.tolist(), [6001, 6000], cfg, backend)
    assert found == [ranked(rising[0], 6001, cfg), ranked(rising[1], 6000, cfg)]


number = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, NAN, INF, -INF]),
    st.floats(width=16, allow_nan=False),
)


@st.composite
def selections(draw):
    page_size = draw(st.integers(1, 5))
    recent, sinks = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    budget = recent + sinks + draw(st.integers(1, 5))
    p, k = page_size, budget * page_size
    share = draw(st.just(0.0) | st.floats(0, 1, exclude_max=True))
    # On both sides of where the share begins to exceed the budget, too.
    more = int(min(budget / share + 1, 4 * budget)) * p if share else k
    edges = st.sampled_from(
        [0, 1, p - 1, p, p + 1, k - 1, k, k + 1, k + p, k + p + 1, more - 1, more, more + 1]
    )
    lengths = draw(st.lists(edges | st.integers(0, 3 * k + p), min_size=1, max_size=4))
    pages = max(-(-n // p) for n in lengths) + draw(st.integers(0, 3))
    # Scores with many equals, and scores without any: backends treat them differently.
    unlike = st.permutations([u / 8 for u in range(pages)])
    alike = st.lists(number, min_size=pages, max_size=pages)
    rows = draw(st.lists(unlike, min_size=len(lengths), max_size=len(lengths)))
    if draw(st.booleans()):
        rows[0] = draw(alike)
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    return config(page_size, budget, recent, sinks, share), lengths, rows, dtype


@settings(deadline=None)
@given(drawn=selections())
@example(drawn=(config(budget=3), [16], [[NAN, NAN, 0.0, 0.0]], torch.float32))
def test_selection_equals_the_rules(backend, drawn):
    cfg, lengths, rows, dtype = drawn
    if refused(backend, dtype):
        return
    expected = [
        select(
            torch.tensor(row, dtype=dtype).tolist(),
            n, cfg.page_size, cfg.budget_pages, cfg.recent_pages, cfg.sink_pages,
            cfg.budget_share,
        )
        for row, n in zip(rows, lengths, strict=True)
    ]  # fmt: skip
    assert run(rows, lengths, cfg, backend, dtype) == expected


@pytest.mark.parametrize("spread", [1e-7, 1e-3, 0.03, 0.5, 3.0, 40.0])
def test_rule4_however_far_scores_lie_apart(backend, spread):
    generator = torch.Generator().manual_seed(0)
    scores = torch.exp(spread * torch.randn((6, 700), generator=generator))
    scores[1] *= -1
    scores[2, ::3] = scores[2, 0]
    scores[3] *= 1e-30
    scores[4, :690] = NAN
    scores[5].clamp_(max=1.0)
    lens = [2800, 2797, 2800, 1600, 2799, 2041]
    for budget, recent, sinks in ((64, 8, 0), (9, 0, 3), (300, 2, 1)):
        cfg = config(budget=budget, recent=recent, sinks=sinks)
        expected = run(scores.tolist(), lens, cfg, "reference")
        assert run(scores.tolist(), lens, cfg, backend) == expected
