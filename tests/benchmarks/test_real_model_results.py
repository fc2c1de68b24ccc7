"""The tables of the real model in the docs are those of the result files."""

import json
from pathlib import Path

import pytest

from benchmarks.policies.tables import markdown

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    "calibrated": "calibrated",
    "default": "default",
    "guessed": "guessed: dense 0 1, Δ 2 7 12 17 23",
    "every layer for itself": "every layer for itself, with the calibrated plan's pages",
}


def read(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def between(text, mark):
    return text.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0]


def plans_table(result):
    means = result["means"]
    lines = [
        "| plan | reads | KL | KL ÷ guessed | perplexity ÷ full | same top-1 |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, shown in NAMES.items():
        plan = means[name]
        lines.append(
            f"| {shown} | {plan['attended_fraction']:.3f} | {plan['kl']:.4f} | "
            f"{plan['kl'] / means['guessed']['kl']:.2f} | {plan['perplexity_ratio']:.4f} | "
            f"{plan['same_top1']:.3f} |"
        )  # fmt: skip
    drawn = sorted(result["random"].values())
    lines.append(
        f"| {len(drawn)} random plans of the calibrated plan's size: best, median | "
        f"{means['calibrated']['attended_fraction']:.3f} | {drawn[0]:.4f}, "
        f"{drawn[len(drawn) // 2]:.4f} | {drawn[0] / means['guessed']['kl']:.2f}, "
        f"{drawn[len(drawn) // 2] / means['guessed']['kl']:.2f} | – | – |"
    )
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("name", "mark"),
    [("docs/calibration.md", "calibration:smollm2"), ("docs/accuracy.md", "calibration:plans")],
)
def test_plans_of_smollm2_are_those_on_file(name, mark):
    found = between(page(name), mark)
    assert plans_table(read("calibration-20261128-smollm2.json")) in found


def test_policies_on_smollm2_are_those_on_file():
    result = read("policies-20261128-smollm2.json")
    assert markdown(result) in between(page("docs/accuracy.md"), "eval:policies")


def test_the_readme_says_what_the_files_do():
    result = read("policies-20261128-smollm2.json")
    rows = {(r["task"], r["context"], r["policy"]): r for r in result["rows"]}
    full = rows["needle", 4000, "full attention"]
    delta = rows["needle", 4000, "DELTA, default plan"]
    low, high = (round(100 * value) for value in delta["difference_interval"])
    means = read("calibration-20261128-smollm2.json")["means"]
    text = " ".join(page("README.md").split())
    for part in (
        f"| {100 * full['score']:.0f} % | {100 * delta['score']:.0f} % |",
        f"{low:+d} to {high:+d} points",
        f"×{means['default']['perplexity_ratio']:.3f}",
        f"×{means['calibrated']['perplexity_ratio']:.3f}",
        f"{means['default']['kl']:.3f}",
        f"{means['calibrated']['kl']:.3f}",
    ):
        assert part in text, part


def test_what_a_calibration_on_a_cpu_took_and_found():
    name = "calibration-20261128-smollm2-cpu.json"
    result, text = read(name), " ".join(page("docs/calibration.md").split())
    assert result["machine"]["cores"] == 2 and not result["machine"]["gpus"]
    means = result["means"]
    for words in (
        name,
        f"{result['seconds']:.0f} seconds and {result['peak_mib']:,} MiB",
        f"Δ-layers {' '.join(map(str, result['plan']['delta_layers']))} and a KL of "
        f"{means['calibrated']['kl']:.4f} on the same texts",
        f"the guessed plan has {means['guessed']['kl']:.4f} there",
    ):
        assert words in text, words


def test_how_much_faster_rows_at_once_are():
    text = " ".join(page("docs/accuracy.md").split())
    ratios = {}
    for row in read("eval-20261128-rows.json")["rows"]:
        ratios.setdefault(row["case"].partition(",")[0], []).append(f"{row['ratio']:.0f}")
    for name, words in (
        ("delta", "took {} and {} times less time with DELTA"),
        ("quest", "{} and {} times with Quest"),
        ("oracle", "{} and {} times with the oracle"),
        ("streaming", "{} and {} times with StreamingLLM"),
    ):
        assert words.format(*ratios[name]) in text, name
