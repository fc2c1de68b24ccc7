"""The numbers of docs/inspection.md are those of the result files."""

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]
NAME = "inspection-20261128-smollm2.json"


@pytest.fixture(scope="module")
def result():
    return load(NAME)


def load(name):
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def document():
    return " ".join((ROOT / "docs" / "inspection.md").read_text(encoding="utf-8").split())


def test_the_result_says_what_made_it(result):
    assert result["benchmark"] == "inspection"
    assert len(result["commit"]) == 40  # not dirty
    assert result["command"].startswith("deltadecode inspect smollm2 ")


def test_the_document_says_what_was_measured(result, document):
    report = result["report"]
    sinks, drift, tokens = report["sinks"], report["drift"], report["tokens"]
    recall = {each["layer"]: each["recall"] for each in report["recall"]}
    worst = min(recall, key=recall.__getitem__)
    overlap = np.array(report["overlap"])
    others = overlap[~np.eye(len(overlap), dtype=bool)].mean()
    bits = np.array(report["entropy_bits"])
    (sink,) = sinks["sinks"]  # the first token alone
    hidden = sinks["hidden"]
    massive = [layer for layer, each in enumerate(hidden) if each["massive"]]
    norms = [each["norm_ratio"] for each in hidden]
    values = [value for each in sinks["layers"] for value in each["first_value_ratio"]]
    shift = report["shift"]
    low, high = int(np.argmin(shift[1:])) + 1, int(np.argmax(shift))
    held = {layer: f"{100 * values[1]:.1f} %" for layer, values in drift["held"].items()}
    for text in (
        NAME,
        f"{tokens['prompt']:,} tokens of prompt and {tokens['new']} new ones",
        f"between {shift[low]:.3f} (into layer {low}) and {shift[high]:.3f} (into layer {high},",
        f"here {np.mean(list(recall.values())):.1%}".replace("%", " %"),
        f"least in layer {worst} ({100 * recall[worst]:.1f} %)",
        f"{100 * others:.1f} % on average, where two random choices have "
        f"{100 * drift['chance']:.1f} % in common",
        f"After {drift['lags'][1]} steps layer 13 still holds {held['13']} of its attention, and "
        f"layer 0 only {held['0']}",
        f"a median of {np.median(bits):.2f} bits and at most {bits.max():.2f}",
        f"first token at most {100 * sink['mean']:.1f} % (layer {sink['layer']})",
        f"{100 * sinks['rate']:.1f} % of {sinks['heads']} heads",
        f"| {100 * sinks['first_token_rate']:.1f} % |",
        f"first token: {min(values):.2f} to {max(values):.2f}",
        f"at most {max(norms):.1f} (layer {int(np.argmax(norms))}) |",
        f"at most {max(each['peak_ratio'] for each in hidden):,.0f} ×; massive in layers "
        f"{massive[0]} to {massive[-1]} |",
    ):
        assert text in document, text
    assert sink["position"] == 0
    assert massive == list(range(massive[0], massive[-1] + 1))
    ends = max(held.values(), key=percent), min(held.values(), key=percent)
    assert ends == (held["13"], held["0"])


def percent(text):
    return float(text.removesuffix(" %"))


def test_sinks_do_not_matter_to_the_embedded_model():
    report = load("inspection-20261124-embedded.json")["report"]
    assert not report["sinks"]["sinks"]
    treatments = report["removal"]["treatments"]
    assert [f"{each['perplexity']:.4f}" for each in treatments] == ["1.0000"] * 6
