"""The DP against every plan of its size, and the paper's rule against curves made by hand."""

import math

import numpy as np
import pytest

from deltadecode.errors import CalibrationError
from deltadecode.lab import plans


def random_r(layers, seed):
    r = np.random.default_rng(seed).random((layers, layers))
    np.fill_diagonal(r, 1.0)
    return r


def kept_by_hand(r, need, full):
    """Walk through the layers, and ask each where its pages come from."""
    total, source = 0.0, None
    for j in range(len(r)):
        if j in full:
            source, share = j, 1.0
        else:
            share = r[source, j]
        total += need[j] * share
    return total / sum(need)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("layers", "count", "dense"),
    [(2, 1, 0), (6, 1, 0), (9, 4, 0), (9, 4, 2), (9, 5, 4), (12, 5, 1), (12, 11, 0), (24, 4, 0)],
)
def test_dp_is_the_best_of_all_plans(layers, count, dense, seed):
    r = random_r(layers, seed)
    need = np.random.default_rng(seed + 100).random(layers) ** 3
    loss = plans.losses(r, need)
    every = list(plans.all_plans(layers, count, dense))
    assert len(every) == math.comb(layers - dense - 1, count - dense - 1)
    best = max(every, key=lambda full: kept_by_hand(r, need, full))
    found = plans.best_plan(loss, count, dense)
    assert found in every
    assert kept_by_hand(r, need, found) == pytest.approx(kept_by_hand(r, need, best), abs=1e-12)
    for full in every[:50]:
        assert plans.kept(loss, full) == pytest.approx(kept_by_hand(r, need, full), abs=1e-12)


def test_without_weights_most_kept_is_highest_recall():
    r = random_r(10, 3)
    full = plans.best_plan(plans.losses(r), 3)
    every = [plans.recall(r, each) for each in plans.all_plans(10, 3)]
    assert plans.recall(r, full) == pytest.approx(max(every))
    assert plans.kept(plans.losses(r), full) == pytest.approx((3 + 7 * max(every)) / 10)


def test_a_layer_that_is_needed_is_full_or_well_fed():
    r = np.full((8, 8), 0.5)
    need = np.ones(8)
    need[5] = 100.0
    assert 5 in plans.best_plan(plans.losses(r, need), 2)
    r[3, 5] = 1.0  # the pages of 3 have all that 5 looks at
    need[7] = 50.0
    assert plans.best_plan(plans.losses(r, need), 3) == (0, 3, 7)


def test_paper_rule_takes_a_peak_of_each_run():
    shift = np.zeros(28)
    shift[[14, 22, 5, 27]] = [0.9, 0.8, 0.85, 0.99]
    # Runs 3-14 and 15-26: 5 is lower than 14, and 27 would select for nobody.
    assert plans.paper_plan(shift, 5, dense=2) == (0, 1, 2, 14, 22)
    deep = np.zeros(48)
    deep[[6, 42, 8]] = [0.9, 0.7, 0.8]
    assert plans.paper_plan(deep, 5, dense=2) == (0, 1, 2, 6, 42)
    assert plans.paper_plan(shift, 1) == (0,)
    assert plans.paper_plan([0, 0.3, 0.1], 2) == (0, 1)


@pytest.mark.parametrize("layers", [2, 3, 5, 9])
@pytest.mark.parametrize("dense", [0, 1, 2])
def test_every_size_that_fits_gives_a_plan(layers, dense):
    rng = np.random.default_rng(0)
    for count in range(dense + 1, layers):
        for full in (
            plans.paper_plan(rng.random(layers), count, dense),
            *plans.hand_picked(layers, count, dense).values(),
            *plans.random_plans(layers, count, dense, draws=3),
        ):
            assert len(full) == count and full in set(plans.all_plans(layers, count, dense))


def test_random_plans_differ_and_repeat():
    found = plans.random_plans(24, 4, 0, draws=50, seed=1)
    assert len(set(found)) == 50 and found == plans.random_plans(24, 4, 0, draws=50, seed=1)
    assert len(plans.random_plans(5, 2, 0, draws=50)) == 4


def test_leading_full_layers_are_dense():
    assert [plans.leading_dense(p) for p in ((0, 1, 2, 9), (0, 4), (0,), (0, 2, 3))] == [2, 0, 0, 0]
    assert plans.dense_and_delta((0, 1, 3), (2, 5, 8, 11), 1) == ((2,), (5, 11))


@pytest.mark.parametrize(("layers", "count", "dense"), [(4, 4, 2), (4, 9, 0), (1, 1, 0)])
def test_a_model_too_small_is_refused(layers, count, dense):
    with pytest.raises(CalibrationError, match=rf"model of {layers} full-attention layers"):
        plans.best_plan(np.ones((layers, layers)), count, dense)
    with pytest.raises(CalibrationError, match="leave no sparse layer"):
        plans.paper_plan(np.ones(layers), count, dense)
    with pytest.raises(CalibrationError, match="at least one Δ-layer"):
        plans.best_plan(np.ones((layers, layers)), 1, 1)
