"""Plans that nobody measured, and the words for a plan."""

import pytest

from deltadecode.errors import CalibrationError
from deltadecode.lab import plans


@pytest.mark.parametrize("layers", [2, 3, 5, 9])
@pytest.mark.parametrize("dense", [0, 1, 2])
def test_every_size_that_fits_gives_a_plan(layers, dense):
    for count in range(dense + 1, layers):
        for full in (
            *plans.hand_picked(layers, count, dense).values(),
            *plans.random_plans(layers, count, dense, draws=3),
        ):
            assert len(full) == count and full[: dense + 1] == tuple(range(dense + 1))
            assert list(full) == sorted(set(full)) and full[-1] < layers


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
        plans.check_size(layers, count, dense)


def test_a_plan_without_a_delta_layer_is_refused():
    with pytest.raises(CalibrationError, match="at least one Δ-layer"):
        plans.check_size(8, 1, 1)
