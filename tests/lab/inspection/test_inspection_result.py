"""The numbers of docs/inspection.md are those of the result file it names."""

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]
NAME = "inspection-20261124-embedded.json"


@pytest.fixture(scope="module")
def result():
    return json.loads((ROOT / "benchmarks" / "results" / NAME).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def document():
    return " ".join((ROOT / "docs" / "inspection.md").read_text(encoding="utf-8").split())


def test_the_result_says_what_made_it(result):
    assert result["benchmark"] == "inspection"
    assert len(result["commit"]) == 40  # not dirty
    assert result["command"].startswith("deltadecode inspect embedded ")


def test_the_document_says_what_was_measured(result, document):
    report = result["report"]
    sinks, drift, tokens = report["sinks"], report["drift"], report["tokens"]
    recall = {each["layer"]: each["recall"] for each in report["recall"]}
    worst = min(recall, key=recall.__getitem__)
    overlap = np.array(report["overlap"])
    others = overlap[~np.eye(len(overlap), dtype=bool)].mean()
    bits = np.array(report["entropy_bits"])
    tops = max(value for each in sinks["layers"] for value in each["top_mean"])
    first = max(value for each in sinks["layers"] for value in each["first_mean"])
    values = [value for each in sinks["layers"] for value in each["first_value_ratio"]]
    place = int(np.argmin(report["shift"][1:])) + 1
    for text in (
        NAME,
        f"{tokens['prompt']:,} tokens of prompt and {tokens['new']} new ones",
        f"between {report['shift'][place]:.3f} (into layer {place}) and {max(report['shift']):.3f}",
        f"here {np.mean(list(recall.values())):.1%}".replace("%", " %"),
        f"least in layer {worst} ({100 * recall[worst]:.1f} %)",
        f"{100 * others:.1f} % on average, where two random choices have "
        f"{100 * drift['chance']:.1f} % in common",
        f"After {drift['lags'][1]} steps layer 0 still holds {100 * drift['held']['0'][1]:.1f} %",
        f"layer 16 only {100 * drift['held']['16'][1]:.1f} %",
        f"a median of {np.median(bits):.2f} bits and at most {bits.max():.2f}",
        f"at most {100 * tops:.1f} % (layer 2, a line end)",
        f"first token at most {100 * first:.1f} %",
        f"{100 * sinks['rate']:.1f} % of {sinks['heads']} heads",
        f"| {100 * sinks['first_token_rate']:.1f} % |",
        f"first token: {min(values):.2f} to {max(values):.2f}",
        f"at most {max(each['norm_ratio'] for each in sinks['hidden']):.1f} |",
        f"at most {max(each['peak_ratio'] for each in sinks['hidden']):.0f} ×; none is massive",
    ):
        assert text in document, text
    assert not sinks["sinks"] and not any(each["massive"] for each in sinks["hidden"])
    treatments = report["removal"]["treatments"]
    assert [f"{each['perplexity']:.4f}" for each in treatments] == ["1.0000"] * 6
    assert {each["agreement"] for each in treatments} == {1.0}
    assert report["plan"]["sink_pages"] == 0 and report["plan"]["budget_pages"] == 100
