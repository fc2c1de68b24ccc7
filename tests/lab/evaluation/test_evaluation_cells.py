"""Budgets that are solved for a fraction of reads, and what is refused before anything runs."""

from dataclasses import replace

import numpy as np
import pytest
from transformers import LlamaConfig

from deltadecode import DeltaConfig
from deltadecode.errors import EvaluationError, PolicyError
from deltadecode.lab.evaluation.ablations import ABLATIONS, cells_of
from deltadecode.lab.evaluation.cells import Cell, Trace, make_cells, slug, solve_budget
from deltadecode.lab.policies import make_policy

# The embedded model's shape, whose plan and pages of 4 the policies then take.
MODEL = LlamaConfig(
    num_hidden_layers=24, hidden_size=256, num_attention_heads=4, num_key_value_heads=1, head_dim=64
)
TRACE = Trace(prompt=1958, longest_prompt=1958, steps=4129)


def fraction(text, budget, overhead=False):
    lengths = np.arange(TRACE.prompt + 1.0, TRACE.prompt + TRACE.steps + 1)
    policy = make_policy(text, MODEL, budget)
    read = policy.expected(lengths, TRACE.prompt)
    return float((read + overhead * policy.overhead(lengths)).sum() / lengths.sum())


@pytest.mark.parametrize(
    "text", ["delta", "quest", "quest-kv", "tidal", "tidal-kv", "streaming", "h2o", "raas-evict",
             "oracle", "random", "delta-variant"],
)  # fmt: skip
def test_a_solved_budget_is_the_largest_that_fits(text):
    budget = solve_budget(text, MODEL, 0.25, TRACE)
    assert 0.2 < fraction(text, budget) <= 0.25 < fraction(text, budget + 16)


def test_the_shipped_plan_reads_a_quarter():
    assert solve_budget("delta", MODEL, 0.25, TRACE) // 4 in (100, 101)


def test_a_fraction_can_cover_the_other_reads():
    without = solve_budget("quest-kv:page_size=8", MODEL, 0.25, TRACE)
    budget = solve_budget("quest-kv:page_size=8", MODEL, 0.25, TRACE, overhead=True)
    assert budget < without / 2
    assert 0.24 < fraction("quest-kv:page_size=8", budget, overhead=True) <= 0.25


@pytest.mark.parametrize(
    ("policies", "budgets", "fractions", "message"),
    [
        (["snapkv"], [], [0.25], "'snapkv' cannot read as little as a fraction of 0.25: with its"),
        (["raas"], [], [0.25], "'raas' cannot read as little as a fraction of 0.25"),
        (["raas"], [1024], [], "never evicts the prompt, and one of 1958 tokens needs 1968"),
        (["delta"], [512, 48], [], "cannot keep to 48 tokens: it needs 13 pages of 4 tokens, 52"),
        (["full", "nope"], [512], [], "unknown policy 'nope'; there are full, delta"),
        (["h2o"], [], [], "policy 'h2o' needs --budgets or --attended-fraction"),
        (["h2o"], [], [1.5], "must be between 0 and 1, got 1.5"),
        ([], [512], [], "names no policy"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(policies, budgets, fractions, message):
    with pytest.raises((PolicyError, EvaluationError)) as caught:
        make_cells(policies, budgets, fractions, MODEL, TRACE)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_full_attention_comes_once_and_every_cell_too():
    cells = make_cells(["full", "h2o"], [64, 64, 128], [], MODEL, TRACE)
    assert cells == [Cell("full", 0), Cell("h2o", 64), Cell("h2o", 128)]


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_starts_from_the_plan(name):
    plan = DeltaConfig.for_model(MODEL)
    cells = cells_of(name, plan)
    assert cells[0] == Cell("full", 0) and len(set(cells)) == len(cells) >= 3
    for cell in cells:
        cell.make(MODEL)
    made = [cell.make(MODEL) for cell in cells[1:]]
    unchanged = [
        cell.policy
        for cell, policy in zip(cells[1:], made, strict=True)
        if replace(policy.cfg, budget_pages=plan.budget_pages) == plan
        and (getattr(policy, "heads", "max"), getattr(policy, "per_layer", 0)) == ("max", 0)
        and (getattr(policy, "refresh", 1), getattr(policy, "accumulate", 0)) == (1, 0)
    ]
    assert unchanged and set(unchanged) == {"delta"}, "one name, so that samples are shared"


def test_plans_have_one_size_and_one_budget():
    plan = DeltaConfig.for_model(MODEL)
    layers = range(MODEL.num_hidden_layers)
    count = len(plan.dense_layers) + len(plan.delta_layers)
    with pytest.raises(EvaluationError, match="needs the plans of a calibration"):
        cells_of("plans", plan, layers)
    with pytest.raises(EvaluationError, match="plan 'mine' of the calibration lacks"):
        cells_of("plans", plan, layers, {"mine": {"dense_layers": [0]}})
    ours = {"dense_layers": [0], "delta_layers": list(range(1, 2 * count - 2, 2))}
    cells = cells_of("plans", plan, layers, {"calibrated": {**ours, "recent_pages": 3}})
    assert cells[0] == Cell("full", 0) and len(cells) >= 8
    made = [cell.make(MODEL) for cell in cells[1:]]
    assert made[0].cfg.delta_layers == tuple(ours["delta_layers"])
    assert plan.delta_layers in [policy.cfg.delta_layers for policy in made]
    for policy in made:
        assert len(policy.cfg.dense_layers) + len(policy.cfg.delta_layers) == count
        assert (policy.cfg.recent_pages, policy.budget) == (3, cells[1].budget)


def test_an_unknown_ablation_lists_the_known():
    with pytest.raises(EvaluationError, match="there are layers, recent, page-size"):
        cells_of("depth", DeltaConfig())


def test_a_slug_is_a_file_name():
    assert slug("delta:page_size=4/../x y") == "delta-page_size=4-..-x-y"
