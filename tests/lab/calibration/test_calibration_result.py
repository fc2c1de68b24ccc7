"""The calibration on file: its plans are those that its own matrices give, counted out."""

import json
from pathlib import Path

import numpy as np
import pytest

from deltadecode.lab import plans

ROOT = Path(__file__).resolve().parents[3]
FILE = ROOT / "benchmarks" / "results" / "calibration-20261124-embedded.json"


@pytest.fixture(scope="module")
def found():
    return json.loads(FILE.read_text(encoding="utf-8"))


def test_dp_is_the_best_of_all_plans_on_the_embedded_model(found):
    need = np.array(found["need"])
    r = np.array(found["r"]["fit"])
    full = tuple(found["plans"]["calibrated"]["delta_layers"])
    loss = plans.losses(r, need)
    every = {each: plans.kept(loss, each) for each in plans.all_plans(24, 4)}
    assert len(every) == found["exhaustive"]["plans"] == 1771
    assert plans.best_plan(loss, 4) == full == max(every, key=every.get)
    assert found["exhaustive"]["fit"]["better"] == 0


def test_few_plans_keep_more_of_the_texts_held_out_and_little_more(found):
    loss = plans.losses(np.array(found["r"]["held_out"]), np.array(found["need"]))
    full = tuple(found["plans"]["calibrated"]["delta_layers"])
    own = plans.kept(loss, full)
    every = {each: plans.kept(loss, each) for each in plans.all_plans(24, 4)}
    better = [each for each, kept in every.items() if kept > own]
    assert len(better) == found["exhaustive"]["held_out"]["better"] <= 2
    assert max(every.values()) - own < 0.002
    assert all(row["ratio"] > 1 for row in found["rows"]) and len(found["rows"]) >= 10


def test_the_papers_rule_and_the_bars(found):
    assert tuple(found["plans"]["cosine-shift"]["delta_layers"]) == plans.paper_plan(
        found["shift"], 4
    )
    assert found["seconds"] < 180 and found["peak_mib"] < 6 * 1024
