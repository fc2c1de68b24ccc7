"""From a measurement to plans: sizes, budgets, halves, and the report."""

import math

import numpy as np
import pytest
from calibration_cases import Tokenizer, tiny_model, token_ids

from deltadecode.config import DeltaConfig, load_meta
from deltadecode.errors import CalibrationError
from deltadecode.lab import plans
from deltadecode.lab.calibration.fit import Measurement, PlanRequest, fitted
from deltadecode.lab.calibration.report import against, plan_file, report
from deltadecode.lab.observe import Prompt

LAYERS, NEW = 7, 10
BASE = DeltaConfig(page_size=2, budget_pages=6, recent_pages=2, dense_layers=(), delta_layers=())


@pytest.fixture(scope="module")
def model():
    return tiny_model(LAYERS)


def measured(model, asked_plan, count=4):
    prompts = [Prompt(i, token_ids(30 + 3 * i, i)) for i in range(count)]
    found = Measurement(model, prompts, asked_plan, NEW)
    found.run(model, Tokenizer(), lambda done, left: None, stride=2)
    return found


@pytest.fixture(scope="module")
def plain(model):
    return measured(model, PlanRequest(BASE, 1, 2))


def test_plans_are_fitted_on_even_texts_and_judged_on_odd_ones(plain):
    budget = plain.captured.budgets[0]
    need = plain.need.weights([0, 2])
    loss = plans.losses(plain.captured.matrix(budget, [0, 2]), need)
    held = plans.losses(plain.captured.matrix(budget, [1, 3]), need)
    ours = fitted(plain)["calibrated"]
    every = {full: plans.kept(loss, full) for full in plans.all_plans(LAYERS, 3, 1)}
    assert len(every) == math.comb(LAYERS - 2, 1)
    assert every[ours.full] == max(every.values())
    said = report(plain)["plans"]["calibrated"]
    assert said["kept"] == {
        "fit": round(every[ours.full], 5), "held_out": round(plans.kept(held, ours.full), 5)
    }  # fmt: skip
    assert said["dense_layers"] == [0] and len(said["delta_layers"]) == 2


def test_the_report_has_both_plans_and_offers(plain):
    said = report(plain)
    assert set(said["plans"]) == {"calibrated", "captured-mass", "cosine-shift"}
    shift = plain.shift.curve([0, 2])
    assert said["plans"]["cosine-shift"]["delta_layers"] == list(plans.paper_plan(shift, 3, 1))[1:]
    pages = {(line["recent_pages"], line["sink_pages"]) for line in said["offers"]}
    assert pages == {(2, 0), (1, 0), (4, 0), (3, 0), (2, 1), (2, 2)}
    shares = [line["kept"]["fit"] for line in said["offers"]]
    assert shares == sorted(shares, reverse=True)
    assert said["tokens"] == [30, 39 + NEW] and len(said["shift"]) == LAYERS


def test_others_of_its_size_are_counted_out(plain):
    said = against(plain)
    assert said["exhaustive"]["plans"] == math.comb(LAYERS - 2, 1)
    assert said["exhaustive"]["fit"]["better"] == 0
    assert np.shape(said["r"]["held_out"]) == (LAYERS, LAYERS)
    assert any("hand-picked" in name for name in said["peers"])


def test_a_plan_file_loads_and_says_where_it_comes_from(plain, model, tmp_path):
    said = report(plain)
    cfg, meta = plan_file(said, model, "tiny", "data.jsonl", "deltadecode calibrate")
    cfg.save(tmp_path / "plan.json", meta=meta)
    assert DeltaConfig.load(tmp_path / "plan.json") == cfg
    assert load_meta(tmp_path / "plan.json") == meta
    assert (cfg.page_size, cfg.budget_pages, cfg.dense_layers) == (2, 6, (0,))
    ours = said["plans"]["calibrated"]
    assert meta["expected"]["recall"] == ours["recall"]["held_out"]
    for key in ("model", "config_hash", "data", "date", "versions", "texts"):
        assert meta[key]


def test_a_fraction_solves_the_budget(model):
    found = measured(model, PlanRequest(BASE, 0, 2, fraction=0.6))
    (budget,) = set(found.sizes.values())
    plan = report(found)["plans"]["calibrated"]
    assert plan["attended_fraction"] <= 0.6 < found.fraction(2, type(budget)(
        budget.budget_pages + 1, 2, 0))  # fmt: skip
    cfg, _ = plan_file(report(found), model, "tiny", "x", "y")
    assert cfg.budget_pages == budget.budget_pages


def test_a_fraction_alone_chooses_the_size_too(model):
    found = measured(model, PlanRequest(BASE, 0, fraction=0.6))
    need = found.need.weights([0, 2])
    best = {}
    for count, budget in found.sizes.items():
        loss = plans.losses(found.captured.matrix(budget, [0, 2]), need)
        best[count] = max(plans.kept(loss, full) for full in plans.all_plans(LAYERS, count))
    assert len(best) >= 2
    ours = fitted(found)["calibrated"]
    said = report(found)["plans"]["calibrated"]
    assert len(ours.full) == max(best, key=best.get)
    assert said["kept"]["fit"] == round(max(best.values()), 5)
    assert said["attended_fraction"] <= 0.6


def test_a_recall_takes_the_fewest_layers(model, plain):
    shares = []
    budget = plain.captured.budgets[0]
    loss = plans.losses(plain.captured.matrix(budget, [0, 2]), plain.need.weights([0, 2]))
    for count in range(2, LAYERS):
        shares.append(plans.kept(loss, plans.best_plan(loss, count, 1)))
    assert shares == sorted(shares)
    asked = (shares[1] + shares[2]) / 2
    found = measured(model, PlanRequest(BASE, 1, recall=asked))
    assert len(fitted(found)["calibrated"].full) == 4
    found.request = PlanRequest(BASE, 1, recall=0.9999999)
    with pytest.raises(CalibrationError, match="no plan keeps 1 of the attention"):
        fitted(found)


@pytest.mark.parametrize(
    ("asked_plan", "message"),
    [
        (PlanRequest(BASE, 2, 5), "2 dense and 5 Δ-layers leave no sparse layer in a model of 7"),
        (PlanRequest(BASE, 0), "give a number of Δ-layers"),
        (PlanRequest(BASE, 0, 2, recall=0.5), "give neither"),
        (PlanRequest(BASE, 0, fraction=1.5), "attended fraction must be between 0 and 1, got 1.5"),
        (PlanRequest(BASE, 0, 6, fraction=0.5), "reads as little as a fraction of 0.5"),
    ],
)
def test_requests_that_cannot_be(model, asked_plan, message):
    prompts = [Prompt(i, token_ids(30, i)) for i in range(2)]
    with pytest.raises(CalibrationError, match=message):
        Measurement(model, prompts, asked_plan, NEW)


def test_one_text_is_too_few(model):
    with pytest.raises(CalibrationError, match="at least 2 texts"):
        Measurement(model, [Prompt(0, token_ids(30, 0))], PlanRequest(BASE, 0, 2), NEW)


def test_a_budget_that_is_never_passed_measures_nothing(model):
    base = DeltaConfig(budget_pages=64, dense_layers=(), delta_layers=())
    with pytest.raises(CalibrationError, match="no observed step has more than 64 pages"):
        fitted(measured(model, PlanRequest(base, 0, 2)))
