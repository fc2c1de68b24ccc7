"""The benchmark of calibration on short problems: rows, figure and the count of all plans."""

import json

import pytest

from benchmarks.calibration import run as calibration
from benchmarks.report import write
from deltadecode.lab.tasks.registry import Chain


@pytest.fixture(scope="module")
def found():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "Chain", lambda: Chain(steps=56, distractors=20))
        return calibration.run("again", lambda done, left: None, problems=2, new_tokens=16)


def test_rows_compare_the_share_that_is_lost(found):
    peers = [row["peer"] for row in found["rows"]]
    assert {"captured-mass", "cosine-shift", "hand-picked, even", "random 8"} <= set(peers)
    assert "calibrated" not in peers and "calibrated" in found["plans"]
    ours = found["plans"]["calibrated"]
    for row in found["rows"]:
        assert row["ours"] == pytest.approx(1 - ours["kept"]["held_out"], abs=1e-4)
        assert row["theirs"] == pytest.approx(1 - row["plan"]["kept"]["held_out"], abs=1e-4)
        assert row["plan"]["attended_fraction"] == ours["attended_fraction"]
        assert len(row["plan"]["delta_layers"]) == 4
    assert found["exhaustive"]["plans"] == 1771 and found["exhaustive"]["fit"]["better"] == 0
    assert found["seconds"] > 0 and found["peak_mib"] > 0


def test_it_is_written_with_a_figure(found, tmp_path):
    said = []
    write(found, tmp_path, "x", said.append, "deltadecode.lab.calibration.figures")
    (file,) = tmp_path.glob("calibration-*-x.json")
    assert json.loads(file.read_text())["commit"] == found["commit"]
    assert file.with_suffix(".png").stat().st_size > 1000 and len(said) == 2
