"""The table of the real model in docs/accuracy.md is that of the result file that it names."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.policies.tables import markdown

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
TABLE = TEXT.partition("<!-- eval:policies -->")[2].partition("<!-- /eval:policies -->")[0]


@pytest.fixture(scope="module")
def result():
    named = re.search(r"\bpolicies-20\d{6}[\w.-]*\.json\b", TABLE)
    if named is None:
        pytest.skip("the table has not been filled yet")
    path = ROOT / "benchmarks" / "results" / named.group()
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_page_opens_with_the_real_model():
    headings = re.findall(r"^## (.+)$", TEXT, re.M)
    assert headings[0] == "On a real model"


def test_the_table_is_that_of_the_file(result):
    assert markdown(result) in TABLE


def test_means_are_those_of_the_samples(result):
    for row in result["rows"]:
        name = "kl" if "kl" in row else "score"
        values = row[f"{name}s"]
        assert row[name] == pytest.approx(sum(values) / len(values), rel=1e-3, abs=1e-4)


def test_there_are_enough_problems_and_every_peer(result):
    assert all(
        row["samples"] >= 100 for row in result["rows"] if "score" in row and "kl" not in row
    )
    names = {row["policy"].partition(",")[0] for row in result["rows"]}
    assert names >= {"full attention", "DELTA", "Kascade", "LessIsMore", "OmniKV", "KeyDiff"}
    assert {"Quest", "StreamingLLM", "H2O", "RaaS", "SnapKV", "Random Attention"} <= names
