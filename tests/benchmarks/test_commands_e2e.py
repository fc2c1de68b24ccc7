"""``python -m benchmarks.e2e``: what it refuses, passes on and prints."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from benchmarks.command import launch
from benchmarks.e2e import run as e2e
from benchmarks.e2e.__main__ import e2e as command

FAKE = str(Path(__file__).with_name("fake_engine.py"))


@pytest.fixture
def run(outcome):
    return partial(outcome, partial(launch, command))


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Engines that make up their times."""
    make = e2e.make_options

    def use(*failure):
        worker = (sys.executable, FAKE, str(tmp_path / "log"), *failure)
        monkeypatch.setattr(
            e2e, "make_options", lambda **given: replace(make(**given), worker=worker)
        )
        monkeypatch.setattr(e2e, "has_vllm", lambda: True)

    return use


def test_help_names_the_workloads(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert "headline" in out and "--in-turn" in out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--workload", "fast"], "'fast'"),
        (["--point", "64"], "'64'"),
        (["--shape", "gpt"], "'gpt'"),
        (["--tag", "a/b"], "'a/b'"),
        (["--steps", "0"], "0"),
        (["--plan", "none.json"], "'none.json'"),
        (["--memory-share", "0.6"], "0.6"),
        (["--lossless", "--workload", "step"], "drafts must be in 1..16 with --lossless, got 0"),
        (["--acceptance", "0.9", "--workload", "step"], "acceptance is of drafts, got 0.9 without"),
        (["--drafts", "2", "--acceptance", "1.5", "--workload", "step"], "at most 1, got 1.5"),
        (["--drafts", "2", "--acceptance", "0", "--workload", "step"], "above 0 and at most 1"),
        (["--drafts", "2", "--acceptance", "nan", "--workload", "step"], "at most 1, got nan"),
        (["--out", __file__], "--out"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(run, fake, options, named):
    fake()
    code, out, err = run(*options)
    assert (code, out) == (2, "")
    assert err.startswith("deltadecode: error: ") and named in err
    assert err.count("\n") == 1


def test_without_vllm_it_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setattr(e2e, "has_vllm", lambda: False)
    code, out, err = run("--shape", "tiny", "--point", "4:900")
    assert (code, out) == (2, "")
    assert err == "deltadecode: error: vLLM is not installed: pip install 'deltadecode[vllm]'\n"


def test_it_prints_and_writes_the_result(run, fake, tmp_path):
    fake()
    options = ["--shape", "tiny", "--workload", "step", "--point", "4:300", "--steps", "8"]
    code, out, err = run(*options, "--json", "--out", tmp_path / "out", "--tag", "x")
    found = json.loads(out)
    assert code == 0
    assert found["rows"][0]["ratio"] == 2.0
    assert "starting stock" in err and "e2e-" in err
    (path,) = (tmp_path / "out").glob("e2e-*-x.json")
    assert json.loads(path.read_text()) == found
    assert path.with_suffix(".png").exists()
    code, out, err = run(*options)
    assert code == 0 and "2.000×" in out


def test_a_failing_engine_is_one_line_and_exit_code_1(run, fake):
    fake("DELTA:fill")
    code, out, err = run("--shape", "tiny", "--workload", "step", "--point", "4:300")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == (
        "deltadecode: error: WorkerError: DELTA engine: RuntimeError: broken on purpose"
    )
