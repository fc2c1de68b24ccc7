"""The record of smoke tests, from JUnit reports as pytest writes them."""

import os
import subprocess
import sys
from functools import partial

import pytest

from benchmarks.command import launch
from benchmarks.smoke.__main__ import smoke
from benchmarks.smoke.run import record, table

TESTS = """
import pytest

def test_one():
    pass

def test_two():
    assert {good}

@pytest.mark.skip
def test_three():
    pass

@pytest.fixture
def broken():
    raise ValueError

def test_four(broken):
    pass
"""
CONFTEST = """
import pytest

@pytest.fixture(scope="session", autouse=True)
def named(record_testsuite_property):
    for name, value in {names}.items():
        record_testsuite_property(name, value)
"""


@pytest.fixture
def report(tmp_path):
    """Writes a report of four tests, of which the second is good or not."""

    def write(name, release, good=True, **more):
        names = {"vllm": f"{release}+cpu", "torch": "2.13.0+cpu", "transformers": "5.24.0"}
        names = {**names, "commit": "c0ffee", **more}
        (tmp_path / "conftest.py").write_text(CONFTEST.format(names=names))
        (tmp_path / "test_vllm_some.py").write_text(TESTS.format(good=good))
        (tmp_path / "pytest.ini").write_text("[pytest]")
        subprocess.run(
            [sys.executable, "-B", "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={name}"],
            cwd=tmp_path, capture_output=True, check=False,
            env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        )  # fmt: skip
        return tmp_path / name

    return write


def test_a_release_has_one_row_and_later_reports_replace_its_tests(report):
    first = report("first.xml", "0.31.0", good=False)
    other = report("other.xml", "0.9.1", good=False)
    again = report("again.xml", "0.31.0", good=True, commit="decade")
    result = record("command", [first, other, again], ["0.24.0: not to be had"])
    assert result["benchmark"] == "smoke" and result["command"] == "command"
    noted, old, new = sorted(result["rows"], key=lambda row: row["release"] != "0.24.0")
    assert noted == {"release": "0.24.0", "note": "not to be had"}
    assert old == {
        "release": "0.9.1", "vllm": "0.9.1+cpu", "torch": "2.13.0+cpu", "transformers": "5.24.0",
        "commit": "c0ffee", "passed": 1, "failed": 2, "skipped": 1, "files": ["test_vllm_some"],
    }  # fmt: skip
    assert (new["commit"], new["passed"], new["failed"], new["skipped"]) == ("decade", 2, 1, 1)
    assert [row["release"] for row in result["rows"]] == ["0.9.1", "0.24.0", "0.31.0"]
    assert table(result).row_count == 3


def test_what_is_no_report_is_refused(tmp_path, outcome):
    path = tmp_path / "some.xml"
    for text, words in (
        ("<testsuites>", "some.xml cannot be read: no element found"),
        ("<testsuites/>", "some.xml is no report of the smoke tests: no vllm, torch, transformers"),
    ):
        path.write_text(text)
        code, out, err = outcome(partial(launch, smoke), path)
        assert (code, out) == (2, "") and words in err
    code, _, err = outcome(partial(launch, smoke), tmp_path / "none.xml")
    assert code == 2 and "none.xml cannot be read" in err


def test_a_note_names_its_release(report, outcome):
    path = report("some.xml", "0.31.0")
    code, _, err = outcome(partial(launch, smoke), path, "--note", "not to be had")
    assert code == 2 and "--note must be 'RELEASE: text', got 'not to be had'" in err
