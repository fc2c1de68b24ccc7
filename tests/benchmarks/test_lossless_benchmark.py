"""The benchmark of lossless mode: what it counts, in small, on the embedded model."""

import json
from functools import partial

import pytest
import torch

from benchmarks.command import launch
from benchmarks.lossless.__main__ import lossless
from benchmarks.lossless.batches import left_padded, ragged
from deltadecode.engines.transformers import speculation

SMALL = ("--context", 320, "--budget", 12, "--texts", 3, "--tokens", 12, "--json")


@pytest.fixture
def rows(outcome):
    """Rows of a run with arguments."""
    pytest.importorskip("deltadecode_embedded")

    def call(*arguments):
        code, out, err = outcome(partial(launch, lossless), *SMALL, *arguments)
        assert code == 0, err
        return json.loads(out)["rows"]

    return call


def test_batches_are_ragged_and_padded_on_the_left():
    prompts = [torch.arange(first, first + 8)[None] for first in (1, 11, 21, 31, 41)]
    beginnings = ragged(prompts, 3)
    assert list(map(len, beginnings)) == [8, 6, 4, 8, 6]
    assert beginnings[4].tolist() == [41, 42, 43, 44, 45, 46]
    tokens, mask = left_padded(beginnings[:3])
    assert mask.sum(dim=1).tolist() == [8, 6, 4]
    assert tokens.tolist()[2] == [0, 0, 0, 0, 21, 22, 23, 24]
    assert torch.equal(mask.bool(), tokens > 0)


def test_equal_tokens_of_ragged_batches(rows, monkeypatch):
    (row,) = rows("--batch", 2)
    assert row["ours"] == row["theirs"] == row["tokens"] == 36 and row["ratio"] == 1
    assert row["same"] == row["texts"] == 3 and row["first_unlike"] is None
    assert 0 < row["accepted"] <= row["verified"] <= row["drafted"]
    # Drafts that are kept unseen are not full attention's, and the count says so.
    everything = torch.ones(1, dtype=torch.bool)
    monkeypatch.setattr(speculation, "verify", lambda scores, drafts, probs: (drafts, everything))
    (row,) = rows("--budget", 10, "--batch", 3)[1:]
    assert row["ours"] < row["theirs"] and row["ratio"] < 1
    assert row["same"] < 3 and row["first_unlike"] is not None


def test_static_caches_are_of_single_texts(outcome):
    code, _, err = outcome(partial(launch, lossless), "--static", "--batch", 2)
    assert code == 2 and "for single texts, got --batch" in err


def test_vllm_counts_equal_tokens_only(outcome):
    for words in (("--batch", 2, "--draft-tokens", 0), ()):
        code, _, err = outcome(partial(launch, lossless), "--engine", "vllm", *words)
        assert code == 2 and "--engine vllm needs --batch, and --draft-tokens of at least 1" in err


@pytest.mark.parametrize("static", [False, True])
def test_times_and_acceptance_of_single_texts(rows, static):
    (row,) = rows("--draft-tokens", 2, *(["--static", "--texts", 1] if static else []))
    assert row["same"] == row["texts"] == (1 if static else 3)
    assert ("StaticCache" in row["peer"]) == static
    assert row["unit"] == "ms a token" and row["ours"] > 0 < row["theirs"]
    assert row["acceptance"] == round(row["accepted"] / row["verified"], 4)


def test_the_figure_shows_acceptance_over_budgets_and_drafts(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.lossless.figure import draw, lines

    rows = [
        {
            "context": context, "budget_pages": budget, "draft_tokens": drafts,
            "acceptance": 1 - drafts / budget,
        }
        for context in (2000, 4000) for budget in (32, 16) for drafts in (4, 2)
    ]  # fmt: skip
    result = {"command": "python -m benchmarks.lossless --model smollm2", "rows": rows}
    of_budget, of_drafts = lines(result)
    assert of_budget["2,000 tokens"] == [(16, 0.75), (32, 0.875)] == of_budget["4,000 tokens"]
    assert of_drafts == {"K 16": [(2, 0.875), (4, 0.75)], "K 32": [(2, 0.9375), (4, 0.875)]}
    draw([result, result], tmp_path / "one.svg")
    draw([result, result], tmp_path / "two.svg")
    drawn = (tmp_path / "one.svg").read_text()
    assert "SmolLM2-135M-Instruct, d = 4" in drawn and "<svg" in drawn
    assert drawn == (tmp_path / "two.svg").read_text()
