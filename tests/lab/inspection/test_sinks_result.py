"""The numbers of docs/sinks.md are those of the result file it names."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
NAME = "inspection-20261128-smollm2.json"


@pytest.fixture(scope="module")
def report():
    path = ROOT / "benchmarks" / "results" / NAME
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["benchmark"] == "inspection" and len(result["commit"]) == 40  # not dirty
    assert result["command"].startswith("deltadecode inspect smollm2 ")
    return result["report"]


@pytest.fixture(scope="module")
def document():
    return " ".join((ROOT / "docs" / "sinks.md").read_text(encoding="utf-8").split())


def percent(share, digits=0):
    return f"{100 * share:.{digits}f} %"


def change(entry, base, *, error=True):
    text = f"{entry['loss'] - base:+.3f}".replace("-", "−")
    return f"{text} ± {entry['error']:.3f}" if error else text


def test_where_the_sinks_are(report, document):
    sinks, first = report["sinks"], {each["layer"]: each for each in report["first_page"]}
    rates = [each["rate"] for each in sinks["layers"]]
    (sink,) = sinks["sinks"]  # the first token alone
    assert sink["position"] == 0 and sinks["rate"] == sinks["first_token_rate"]
    assert not any(rates[:12]) and all(rates[12:])
    late = [first[layer]["mass"] for layer in range(12, 30)]
    assert [each["first_norm_ratio"] > 20 for each in sinks["hidden"]][10:12] == [False, True]
    for text in (
        NAME,
        f"{report['tokens']['prompt']:,} tokens of Python's documentation in the cache, then "
        f"{report['tokens']['new'] - 1} decode steps",
        f"the first {report['losses']['steps']} of them",
        f"{percent(sinks['rate'], 1)} of {sinks['heads']} heads",
        f"{percent(min(rates[12:]))} to {percent(max(rates[12:]))} of the heads",
        f"{percent(min(late))} to {percent(max(late))} of a layer's attention",
        f"up to {sink['hidden_ratio']:.0f} times the median",
        f"its values are {sink['value_ratio']:.2f} times as long",
    ):
        assert text in document, text


def test_who_misses_them(report, document):
    first = {each["layer"]: each for each in report["first_page"]}
    plan, steps = report["plan"], report["tokens"]["over_budget_steps"]
    assert plan["dense_layers"] == [0, 1] and plan["delta_layers"] == [2, 15, 23]
    assert (plan["budget_pages"], plan["page_size"], plan["recent_pages"]) == (32, 16, 8)
    assert [first[layer]["missed"] for layer in plan["delta_layers"]] == [1.0, 0.0, 0.0]
    assert f"in 0 of {steps} steps" in document
    lost = [percent(first[layer]["missed_mass"]) for layer in (12, 13, 14)]
    assert f"they put {lost[0]}, {lost[1]} and {lost[2]} of their attention" in document


def test_what_the_pages_are_worth(report, document):
    losses = report["losses"]
    forced = {each["sink_pages"]: each for each in losses["sink_pages"]}
    removal = {each["name"]: each for each in losses["removal"]}
    rows = {
        "S = 0: left to selection": forced[0],
        "**S = 1**": forced[1],
        "S = 2": forced[2],
        "S = 4": forced[4],
        "first page masked out": removal["DELTA, sink pages masked out"],
    }
    full = removal["full attention"]
    assert f"| full attention | 0 | {full['perplexity']:.2f} | 100 % |" in document
    for name, each in rows.items():
        row = f"| {name} | {each['kl']:.3f} | {each['perplexity']:.2f} | "
        assert row + f"{percent(each['agreement'])} |" in document, row
    without = removal["full attention, sink pages masked out"]["perplexity"]
    control = removal["full attention, middle pages masked out (control)"]["perplexity"]
    assert f"a perplexity of {without:.2f}; without a page in the middle it has {control:.2f}" in (
        document
    )
    sinkless, plain = removal["DELTA, page scores without the sink"], forced[1]
    assert (
        f"KL is {sinkless['kl']:.4f} instead of {plain['kl']:.4f}, the perplexity "
        f"{sinkless['perplexity']:.2f} instead of {plain['perplexity']:.2f}" in document
    )


def test_what_a_factor_does(report, document):
    losses = report["losses"]
    base = {
        "full attention": losses["removal"][0]["loss"],
        "DELTA": next(each for each in losses["sink_pages"] if each["sink_pages"] == 1)["loss"],
    }
    names = {
        ("full attention", "all"): "full attention, all",
        ("full attention", "with a sink"): "full attention, those with a sink there",
        ("full attention", "without"): "full attention, the others",
        ("DELTA", "all"): "DELTA with S = 1, all",
    }
    for (under, heads), name in names.items():
        found = [e for e in losses["factors"] if (e["under"], e["heads"]) == (under, heads)]
        found.sort(key=lambda each: each["factor"])
        cells = [change(each, base[under], error=under != "DELTA") for each in found]
        assert f"| {name} | {' | '.join(cells)} |" in document, cells
