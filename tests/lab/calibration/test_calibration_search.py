"""The search against every plan of a made-up model, and what ends it."""

import time
from itertools import combinations

import numpy as np
import pytest
from made_losses import MadeLosses, space

from deltadecode.lab.calibration.losses import OutOfTime
from deltadecode.lab.calibration.search import beats, eliminate, exchange, search

TEXTS = [0, 1, 3, 4]


def best_of_all(losses, found):
    every = [
        cfg
        for count in found.counts
        for rest in combinations(range(1, found.layers), count - 1)
        for recent in found.recents
        if (cfg := found.solved((0, *rest), recent, 1)) is not None
    ]
    return min(losses.kl(cfg, TEXTS) for cfg in every)


def test_it_finds_what_is_best_of_all():
    found = space()
    losses = MadeLosses(found, noise=0.0)
    search(losses, found, TEXTS, seed=0)
    tried = len({cfg for cfg, _ in losses.seen})
    best = next(iter(losses.measured(TEXTS).values()))
    assert best == pytest.approx(best_of_all(losses, found), rel=0.02)
    assert tried < 400


def test_a_seed_gives_the_same_search():
    runs = []
    for seed in (1, 1, 2):
        found = space()
        losses = MadeLosses(found)
        search(losses, found, TEXTS, seed)
        runs.append(losses.seen)
    assert runs[0] == runs[1] != runs[2]


def test_elimination_keeps_the_layers_that_need_their_own_pages():
    found = space()
    losses = MadeLosses(found, needy=(5, 6, 11))
    left = eliminate(losses, found, TEXTS)
    assert set(left) == set(found.counts)
    assert {5, 6, 11} <= set(left[5])
    # Lazily: far fewer passes than all pairs of a layer and what is left.
    assert len({cfg for cfg, _ in losses.seen}) < 14 * 13 / 2 - 10


def test_exchanges_end_where_none_helps():
    found = space()
    losses = MadeLosses(found)
    end = exchange(losses, found, TEXTS, found.solved((0, 1, 2), 4, 1), np.random.default_rng(0))
    others = [*found.near(end), *found.far(end)]
    assert not any(beats(losses, other, end, TEXTS) for other in others)


def test_a_plan_without_hope_is_left_after_one_text():
    found = space()
    losses = MadeLosses(found)
    good, bad = found.solved((0, 5, 11), 4, 1), found.solved((0, 1, 2), 4, 1)
    assert beats(losses, good, bad, TEXTS)
    losses = MadeLosses(found)
    assert not beats(losses, bad, good, TEXTS)
    assert losses.seen == [(bad, 0), (good, 0)]


def test_elimination_that_runs_out_of_time_goes_by_what_it_knows():
    found = space()
    for passes, some in ((5, False), (4 * 13 + 2, True)):
        losses = MadeLosses(found, needy=(5, 6, 11))
        losses.until = time.monotonic() + 1000
        losses.reserve = lambda losses=losses, passes=passes: 2000.0 * (losses.passes >= passes)
        if some:
            left = eliminate(losses, found, TEXTS)
            assert losses.passes == passes and {5, 6, 11} <= set(left[5])
        else:
            with pytest.raises(OutOfTime):
                eliminate(losses, found, TEXTS)


def test_time_ends_it_with_what_it_has():
    found = space()
    losses = MadeLosses(found)
    losses.until = time.monotonic() + 1000
    losses.reserve = lambda: 0.0 if losses.passes < 30 else 2000.0
    search(losses, found, TEXTS, seed=0)
    assert losses.passes == 30
