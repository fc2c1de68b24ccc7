"""Which plans a calibration may try: K solved for the reads, exchanges, and what cannot be."""

from dataclasses import replace

import pytest
from made_losses import BASE, LAYERS, config, space

from deltadecode.errors import CalibrationError
from deltadecode.lab.calibration.space import Request, asked


def test_the_budget_is_the_largest_that_reads_no_more():
    found = space()
    for count in found.counts:
        pages = found.pages(count, 4, 1)
        cfg = found.plan(tuple(range(count)), 4, 1, pages)
        assert found.reads(cfg) <= 0.4 < found.reads(replace(cfg, budget_pages=pages + 1))
        by_hand = (count * 1000 + (LAYERS - count) * pages * 4) / (LAYERS * 1000)
        assert found.reads(cfg) == pytest.approx(by_hand, abs=0.001)
    assert found.counts == [1, 2, 3, 4, 5]


def test_leading_full_layers_are_dense_and_the_rest_select():
    cfg = space().solved((0, 1, 2, 7), 4, 1)
    assert (cfg.dense_layers, cfg.delta_layers) == ((0, 1), (2, 7))
    assert space().places(cfg) == (0, 1, 2, 7)


def test_a_number_of_deltas_keeps_the_dense_layers_and_the_budget():
    found = space(Request(BASE, deltas=3, dense=1))
    assert found.counts == [4] and found.first == 1
    moves = [*found.near(found.solved((0, 1, 5, 9), 4, 1))]
    moves += found.far(found.solved((0, 1, 5, 9), 4, 1))
    assert {(m.dense_layers, len(m.delta_layers), m.budget_pages) for m in moves} == {((0,), 3, 20)}
    assert all(move.delta_layers[0] == 1 for move in moves)
    assert found.default() is None  # two Δ-layers behind two dense ones
    assert space(Request(BASE, deltas=2, dense=2)).default() == BASE


def test_exchanges_move_add_and_take_out_and_change_l_and_s():
    found = space()
    start = found.solved((0, 5, 9), 4, 1)
    near, far = list(found.near(start)), list(found.far(start))
    places = {found.places(cfg) for cfg in near}
    assert {(0, 5), (0, 9), (0, 3, 9), (0, 5, 12), (0, 2, 5, 9)} <= places
    assert (0, 5, 13) not in places and (0, 5, 13) in {found.places(cfg) for cfg in far}
    assert {cfg.recent_pages for cfg in near} == {4, 16, 32, 48}
    assert {cfg.sink_pages for cfg in near} == {0, 1, 2}
    assert all(found.reads(cfg) <= 0.4 for cfg in near + far)
    fixed = space(Request(BASE, fraction=0.4, fixed=frozenset({"recent_pages", "sink_pages"})))
    assert {(cfg.recent_pages, cfg.sink_pages) for cfg in fixed.near(start)} == {(4, 1)}


def test_the_default_at_equal_reads():
    cfg = space().default()
    assert (cfg.dense_layers, cfg.delta_layers) == (BASE.dense_layers, BASE.delta_layers)
    assert cfg.budget_pages == space().pages(4, 4, 1) != BASE.budget_pages
    assert space(Request(BASE, fraction=0.2)).default() is None  # four layers alone read 0.29


def test_a_request_without_a_size_reads_as_much_as_the_models_own_plan():
    lengths = space().lengths
    request = asked(config(), Request(BASE), lengths)
    assert request.fraction == pytest.approx((4 + 10 * 0.08) / 14)
    assert asked(config(), Request(BASE, kl=0.1), lengths) == Request(BASE, kl=0.1)
    with pytest.raises(CalibrationError, match="reads everything at 60 tokens"):
        asked(config(), Request(BASE), lengths * 0.06)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(BASE, fraction=0.05), "no plan reads as little as a fraction of 0.05 of 1000"),
        (Request(BASE, fraction=1.0), "must be between 0 and 1, got 1"),
        (Request(BASE, fraction=0.3, kl=0.1), "give neither"),
        (Request(BASE, kl=-1.0), "must be above 0, got -1"),
        (Request(BASE, deltas=14), "leave no sparse layer in a model of 14"),
        (Request(BASE, deltas=12, dense=2), "leave no sparse layer in a model of 14"),
    ],
)
def test_what_cannot_be_is_refused(request_, message):
    with pytest.raises(CalibrationError, match=message):
        space(request_)
