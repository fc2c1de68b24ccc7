"""Commits side by side: another source is timed as such, in turns, and its commit is found."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import base, processes
from benchmarks.cpu import run as cpu
from benchmarks.kernels import run as kernels
from benchmarks.kernels.cases import Shape
from benchmarks.processes import ROOT
from deltadecode.cli.output import BadInput

SHAPE = Shape(4, 2, 2, 1100)


@pytest.fixture
def another_source(tmp_path):
    """This source again, in another folder."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src", tmp_path / "older" / "src", ignore=ignored)
    return tmp_path / "older"


def test_kernels_of_a_folder_stand_beside_ours(another_source):
    told = []
    found = kernels.compare_commits(
        [SHAPE], None, another_source, "again", rounds=3, progress=lambda *case: told.append(case)
    )
    assert json.loads(json.dumps(found)) == found
    assert (found["benchmark"], found["command"]) == ("kernels", "again")
    assert [line["case"] for line in found["rows"]] == [
        f"{op}, one by one, {SHAPE.label}" for op in ("dense", "scores", "sparse", "select")
    ]
    for line in found["rows"]:
        assert (line["peer"], line["unit"]) == ("base older", "us")
        assert line["ratio"] == pytest.approx(line["theirs"] / line["ours"], rel=0.01)
        for side in ("ours", "theirs"):
            low, middle, high = line[f"quartiles_{side}"]
            assert 0 < low <= middle <= high
            assert line[side] == pytest.approx(middle, rel=1e-4)
    assert told[0] == (SHAPE.label, 0.0)


def test_steps_are_those_of_the_base_and_not_of_ours(another_source):
    # A base that is ten times slower where DELTA decodes.
    module = another_source / "src" / "deltadecode" / "__init__.py"
    slower = "\n_enable = __getattr__('enable')\ndef enable(model, cfg):\n    import time\n"
    slower += "    model.register_forward_pre_hook(lambda *inputs: time.sleep(0.5))\n"
    module.write_text(module.read_text() + slower + "    return _enable(model, cfg)\n")
    found = cpu.compare_commits("a-name", another_source, "again", quick=True, rounds=2)
    ratios = {line["case"].split(",")[0]: line["ratio"] for line in found["rows"]}
    assert {line["peer"] for line in found["rows"]} == {"base a-name"}
    assert list(ratios) == ["stock", "K ≥ N", "DELTA"]
    assert ratios["DELTA"] > 2 * ratios["stock"]


def test_a_source_that_is_not_imported_is_refused(another_source, monkeypatch):
    ours = processes.environment()
    monkeypatch.setattr(processes, "environment", lambda source: ours)
    with pytest.raises(processes.WorkerError, match="was to be timed, but"):
        kernels.compare_commits([SHAPE], None, another_source, "again", rounds=1)


def test_a_commit_is_taken_from_the_history_and_its_worktree_goes_again(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@x", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    source = tmp_path / "src" / "deltadecode" / "__init__.py"
    source.parent.mkdir(parents=True)
    git("init", "--quiet")
    for text in ("older", "newer"):
        source.write_text(text)
        git("add", ".")
        git("commit", "--quiet", "--message", text)
    monkeypatch.setattr(base, "ROOT", tmp_path)
    with base._source("HEAD~1", None) as (name, folder):
        assert name == "base " + git("rev-parse", "--short", "HEAD~1")
        assert (folder / "deltadecode" / "__init__.py").read_text() == "older"
    assert not folder.exists()
    assert len(git("worktree", "list").splitlines()) == 1
    with pytest.raises(BadInput, match="commit of this checkout"), base._source("nothing", None):
        pass


def test_a_folder_without_a_source_is_refused(tmp_path):
    with pytest.raises(BadInput, match="src/deltadecode"), base._source(None, Path(tmp_path)):
        pass
