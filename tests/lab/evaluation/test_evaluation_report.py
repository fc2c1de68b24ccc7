"""Intervals, rows, tables, figures and documents, from files written by hand."""

import json

import numpy as np
import pytest

from deltadecode.errors import EvaluationError
from deltadecode.lab.evaluation.records import Records
from deltadecode.lab.evaluation.report import fill_document, make_result, write
from deltadecode.lab.evaluation.statistics import mean_interval, paired_difference
from deltadecode.lab.evaluation.summary import load, markdown, summarize, tables, verdicts

MADE_BY = {
    "commit": "abc",
    "machine": {"cpu": "c", "gpus": ["a GPU"]},
    "versions": {"torch": "1"},
    "fraction": None,
}


def write_cell(folder, policy, budget, scores, read, *, metadata=0.0, task=None, **more):
    settings = {
        "model": "m",
        "task": task or {"name": "chain", "steps": 9},
        "policy": policy,
        "budget": budget,
        "seed": 5,
        "dtype": "float32",
        "chat": False,
    }
    name = f"{settings['task']['name']}__{policy}__{budget}.jsonl".replace(":", "-")
    records = Records.open(folder / name, settings, MADE_BY)
    records.add(
        {
            "seed": 5 + place, "score": float(score), "tokens": 10, "read": float(read),
            "full": 100, "kept": read / 10, "metadata": metadata,
            "first_wrong": None if score == 1 else place,
            **{key: value[place] for key, value in more.items()},
        }
        for place, score in enumerate(scores)
    )  # fmt: skip
    return records


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "samples"
    write_cell(path, "full", 0, [1] * 20, 100)
    write_cell(path, "delta", 40, [1] * 18 + [0] * 2, 25)
    write_cell(path, "h2o", 25, [0] * 15 + [1] * 5, 25)
    write_cell(path, "quest-kv", 30, [1] * 19 + [0], 24, metadata=12.5)
    write_cell(path, "streaming", 60, [0] * 20, 60)
    write_cell(path, "tidal-kv", 50, [1] * 20, 50)
    write_cell(path, "oracle", 10, [1] * 20, 10)
    return path


def test_wilsons_interval_is_that_of_the_textbook():
    found = mean_interval(np.array([1.0] * 18 + [0.0] * 2))
    # (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96
    z, p, n = 1.959964, 0.9, 20
    middle, half = p + z * z / 2 / n, z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5
    assert found.mean == pytest.approx(0.9)
    assert found.low == pytest.approx((middle - half) / (1 + z * z / n), abs=1e-5)
    assert found.high == pytest.approx((middle + half) / (1 + z * z / n), abs=1e-5)


def test_the_difference_is_paired():
    rng = np.random.default_rng(0)
    ours = rng.random(400)
    found = paired_difference(ours, ours - 0.1 + 0.01 * rng.standard_normal(400))
    # Unpaired, an interval of two uniform samples would be ±0.04 wide.
    assert found.mean == pytest.approx(0.1, abs=2e-3)
    assert found.high - found.low == pytest.approx(4 * 0.01 / 20, rel=0.15)
    assert found.low < found.mean < found.high
    same = paired_difference(ours, ours)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="must be the same"):
        paired_difference(ours, ours[1:])


def test_a_row_has_scores_reads_and_intervals(folder):
    rows = {row["policy"]: row for row in summarize(load([folder]))}
    assert next(iter(rows)) == "full"
    delta = rows["delta"]
    assert delta["case"] == "chain:steps=9, delta 40"
    assert (delta["score"], delta["difference"]) == (0.9, -0.1)
    assert delta["difference_interval"][0] < -0.1 < delta["difference_interval"][1] <= 0
    assert (delta["attended_fraction"], delta["tokens_kept"]) == (0.25, 2.5)
    assert (delta["ours"], delta["theirs"], delta["ratio"]) == (3.0, 1.0, 0.333)
    assert delta["wrong_somewhere"] == 2 and delta["first_wrong"][-2:] == [18, 19]
    assert rows["quest-kv"]["metadata_fraction"] == 0.125


def test_a_peer_that_wins_is_named(folder):
    (line,) = verdicts(summarize(load([folder])))
    better, level, worse = (part.split(". ")[0] for part in line.split(": ")[2:])
    assert better == "quest-kv 30 (95.0, reads 24.0 % + 12.5 %)"
    assert level == "none"
    # One that reads more and wins is not named; one that reads more and loses is.
    assert worse == "h2o 25 (25.0, reads 25.0 %), streaming 60 (0.0, reads 60.0 %)."
    assert "oracle" not in line and "tidal" not in line


def test_without_peers_there_is_no_verdict(folder):
    rows = summarize(load([folder]))
    assert verdicts([row for row in rows if row["policy"] in ("full", "delta", "oracle")]) == []


def test_a_cell_that_lacks_samples_is_refused(folder):
    write_cell(folder, "random", 40, [0] * 12, 25)
    with pytest.raises(EvaluationError, match="lacks 8 of 20 samples; run it again to its end"):
        summarize(load([folder]))


def test_without_full_attention_there_is_no_comparison(folder):
    (folder / "chain__full__0.jsonl").unlink()
    with pytest.raises(EvaluationError, match="has no run of policy 'full' to compare with"):
        summarize(load([folder]))


def test_what_cannot_be_read_is_refused(folder, tmp_path):
    with pytest.raises(EvaluationError, match=r"no \.jsonl file"):
        load([tmp_path])
    with pytest.raises(EvaluationError, match="of the same cell as"):
        load([folder, folder / "chain__h2o__25.jsonl"])


def test_perplexity_is_a_ratio(tmp_path):
    task = {"name": "perplexity", "tokens": 8}
    rng = np.random.default_rng(0)
    nll = rng.random(50)
    write_cell(tmp_path, "full", 0, [1] * 50, 100, task=task, nll=nll)
    write_cell(tmp_path, "h2o", 25, [0.5] * 50, 25, task=task, nll=nll + 0.2)
    row = summarize(load([tmp_path]))[1]
    assert row["perplexity"] == pytest.approx(np.exp(nll.mean() + 0.2), rel=1e-4)
    assert row["perplexity_ratio"] == pytest.approx(np.exp(0.2), rel=1e-4)
    assert "perplexity ÷ full" in markdown([row])


def text_cells(folder):
    task = {"name": "text", "source": "stdlib-docs", "digest": "d", "tokens": 8}
    rng = np.random.default_rng(0)
    nll, kl = rng.random(50), rng.random(50)
    for policy, budget, factor in (("full", 0, 0), ("delta", 25, 1), ("h2o", 25, 2)):
        write_cell(
            folder, policy, budget, [1 - 0.1 * factor] * 50, 25 if budget else 100, task=task,
            nll=nll + 0.1 * factor, kl=kl * factor, at_once=[policy != "h2o"] * 50,
        )  # fmt: skip
    return kl


def test_a_text_has_a_divergence(tmp_path):
    kl = text_cells(tmp_path / "s")
    full, delta, h2o = summarize(load([tmp_path / "s"]))
    assert delta["kl"] == pytest.approx(kl.mean(), rel=1e-4)
    low, high = delta["kl_interval"]
    assert low < kl.mean() < high and high - low < 0.2
    assert (delta["perplexity_ratio"], h2o["perplexity_ratio"]) == pytest.approx(
        (np.exp(0.1), np.exp(0.2)), rel=1e-4
    )
    assert delta["ratio"] == pytest.approx(np.exp(-0.1), rel=1e-3)
    assert (full["rows"], h2o["rows"]) == ("at once", "step by step")
    assert delta["case"] == "text:source=stdlib-docs:tokens=8, delta 25"
    text = markdown([full, delta, h2o])
    assert "KL, nats a token" in text and "same token" in text
    (said,) = verdicts([full, delta, h2o])
    assert f"Worse with no fewer reads: h2o 25 (KL {h2o['kl']:.4f}" in said
    assert len(write(make_result(load([tmp_path / "s"]), "x"), tmp_path / "r", "t")) == 4


def test_the_report_is_a_result_file_with_figures_and_fills_a_document(folder, tmp_path):
    found = make_result(load([folder]), "deltadecode eval --report samples")
    assert found["benchmark"] == "eval" and len(found["rows"]) == 7
    assert (found["commit"], found["versions"]) == ("abc", {"torch": "1"})
    files = write(found, tmp_path / "results", "t")
    assert [file.name.split("-", 2)[2] for file in files] == [
        "t.json", "t-budget.png", "t-reads.png", "t-first-wrong.png",
    ]  # fmt: skip
    assert json.loads(files[0].read_text())["rows"][0]["policy"] == "full"
    assert all(file.stat().st_size > 5000 for file in files[1:])
    document = tmp_path / "docs" / "page.md"
    document.parent.mkdir()
    document.write_text("before\n<!-- eval:t -->\nold\n<!-- /eval:t -->\nafter\n")
    for _ in range(2):  # filling again changes nothing
        fill_document(document, "t", found, files)
    text = document.read_text()
    assert text.startswith("before\n<!-- eval:t -->\n") and text.endswith(
        "<!-- /eval:t -->\nafter\n"
    )
    assert "old" not in text and text.count("| quest-kv | 30 | 24.0 % | 12.5 % | 2 | 95.0 |") == 1
    assert f"](../results/{files[1].name})" in text
    with pytest.raises(EvaluationError, match="to fill"):
        fill_document(document, "u", found, files)


def test_tables_are_by_task(folder):
    write_cell(folder, "full", 0, [1] * 3, 100, task={"name": "needle", "length": 9})
    shown = tables(summarize(load([folder])))
    assert [table.row_count for table in shown] == [7, 1]
