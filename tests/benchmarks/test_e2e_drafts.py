"""Drafts whose acceptance is drawn, on both sides of the end-to-end benchmark."""

import io

import pytest
from rich.console import Console

from benchmarks.e2e.rows import e2e_table, make_row
from benchmarks.e2e.run import make_options
from benchmarks.e2e.workloads import drawn_acceptance, own_drafts

ROUND = {"seconds": [0.004, 0.004], "from": 300, "to": 306, "preemptions": 0, "verified": 24}


@pytest.fixture
def setup():
    return make_options(shape="tiny", kinds=["step"], points=["4:400"], drafts=3, acceptance=0.69)


def test_both_sides_draw_alike(setup, tmp_path):
    assert "--drafts 3 --acceptance 0.69" in setup.command
    sides = [setup.spec(side, tmp_path) for side in ("stock", "DELTA")]
    for spec in sides:
        assert (spec["drafts"], spec["lossless"], spec["acceptance"]) == (3, False, 0.69)


def test_vllm_gets_the_rates_of_a_draft_and_all_before_it():
    found = drawn_acceptance(3, 0.5)
    assert found["rejection_sample_method"] == "synthetic"
    assert found["synthetic_acceptance_rates"] == [0.5, 0.25, 0.125]
    assert own_drafts(3, 0.5).items() >= found.items()
    assert drawn_acceptance(3, None) == {}


def test_a_row_says_what_a_step_gave_on_either_side(setup):
    (one,) = setup.workloads
    assert one.case == (
        "decode step with 3 drafts, synthetic acceptance 0.69, batch 4, context 400"
    )
    ours = [{**ROUND, "seconds": [0.002, 0.002], "tokens": given} for given in (2.5, 2.4375)]
    theirs = [{**ROUND, "tokens": given} for given in (2.5, 2.5)]
    made = make_row(one, ours, theirs, [], setup.plan)
    # Of a step, not of a token: what is accepted changes the tokens that it gives alone.
    assert (made["ours"], made["theirs"], made["ratio"]) == (2.0, 4.0, 2.0)
    assert (made["drafts"], made["synthetic_acceptance"]) == (3, 0.69)
    assert made["tokens_a_step_ours"] == [2.5, 2.438]
    assert made["tokens_a_step_theirs"] == [2.5, 2.5]
    text = io.StringIO()
    machine = {"gpus": [], "cpu": "x"}
    shown = e2e_table({"model": "tiny", "machine": machine, "rows": [made], "skipped": []})
    Console(file=text, width=200).print(shown)
    assert "tokens a step: 2.5 and 2.47" in text.getvalue()


def test_a_row_without_drafts_says_nothing_of_them():
    setup = make_options(shape="tiny", kinds=["step"], points=["4:400"])
    made = make_row(setup.workloads[0], [ROUND], [ROUND], [], setup.plan)
    assert not {"drafts", "synthetic_acceptance", "tokens_a_step_ours"} & set(made)
