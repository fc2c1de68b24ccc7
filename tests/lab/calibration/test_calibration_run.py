"""From texts to a plan: judged on others, never behind the default, resumed after a kill."""

import json

import numpy as np
import pytest
import torch
from calibration_cases import tiny_model, token_ids
from made_losses import BASE, MadeLosses, config, space

from deltadecode import DeltaConfig
from deltadecode.errors import CalibrationError
from deltadecode.lab.calibration import losses as losses_module
from deltadecode.lab.calibration import run
from deltadecode.lab.calibration.losses import Losses
from deltadecode.lab.calibration.report import plan_file, report
from deltadecode.lab.calibration.run import CALIBRATED, DEFAULT, EVEN, calibrate, split
from deltadecode.lab.calibration.space import Request
from deltadecode.lab.calibration.texts import Piece

TINY = DeltaConfig(page_size=4, budget_pages=8, recent_pages=2, sink_pages=1,
                   dense_layers=(0,), delta_layers=(1, 4))  # fmt: skip
CONTEXT, ROWS = 100, 12


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=7)


def pieces(count=3):
    return [Piece(token_ids(CONTEXT + ROWS + 1, seed), CONTEXT) for seed in range(count)]


def tiny(model, request=None, minutes=1.0, **options):
    request = request or Request(TINY, fraction=0.6)
    return calibrate(model, pieces(), request, np.array([100.0]), minutes=minutes, **options)


def made(monkeypatch, losses):
    """Let a calibration measure by a rule."""
    monkeypatch.setattr(run, "Losses", lambda *arguments: losses)


def test_every_third_text_is_held_out():
    assert split(6) == ([0, 1, 3, 4], [2, 5])
    assert split(2) == ([0], [1]) and split(3) == ([0, 1], [2])
    with pytest.raises(CalibrationError, match="at least 2 texts"):
        split(1)


def test_the_plan_is_of_the_request_and_the_report_says_what_it_costs(model):
    found = tiny(model)
    said = report(found)
    ours = said["plans"][CALIBRATED]
    assert next(iter(said["plans"])) == CALIBRATED and {DEFAULT, EVEN} <= set(said["plans"])
    assert ours["attended_fraction"] <= 0.6
    assert ours["kl"]["held_out"] <= said["plans"][DEFAULT]["kl"]["held_out"]
    best = min(kl for _, kl in said["measured"])
    assert best == said["measured"][0][1]
    assert ours["over_default_interval"][0] <= ours["over_default"] <= 0
    json.dumps(said)
    cfg, meta = plan_file(said, model, "tiny", "text", "deltadecode calibrate")
    assert cfg == found.chosen and meta["expected"]["kl"] == ours["kl"]["held_out"]


def test_the_loss_is_that_of_delta_over_full_attention(model):
    found = tiny(model)
    text = found.held_out[0]
    ids = torch.tensor([found.losses.pieces[text].ids])
    with torch.no_grad():
        full = model(ids).logits[0, CONTEXT:-1].double().log_softmax(dim=1)
    rows = found.losses.rows(found.chosen, text)
    prepared = losses_module.RowsText.prepare(model, ids[0], CONTEXT)
    ours = prepared.log_probs(model, found.space.policy(found.chosen)).double()
    kl = (full.exp() * (full - ours)).sum(dim=1)
    np.testing.assert_allclose(rows.kl, kl, rtol=1e-4, atol=1e-5)
    target = ids[0, CONTEXT + 1 :, None]
    np.testing.assert_allclose(rows.lost, (full - ours).gather(1, target)[:, 0], atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_never_behind_the_default_on_held_out_texts(monkeypatch, seed):
    """Held-out texts on which every other plan is a little behind: the default must be returned."""
    found = space()
    losses = MadeLosses(found)
    by_rule = losses._measured
    default = found.default()

    def turned(cfg, text):
        rows = by_rule(cfg, text)
        if text % 3 == 2 and cfg != default:
            rows = type(rows)(by_rule(default, text).kl + 1e-4, rows.lost, rows.same)
        return rows

    losses._measured = turned
    made(monkeypatch, losses)
    result = calibrate(config(), losses.pieces, Request(BASE, fraction=0.4), found.lengths,
                       minutes=1, seed=seed)  # fmt: skip
    assert result.chosen == default == result.plans[DEFAULT]


def test_of_those_not_behind_the_default_all_texts_choose(monkeypatch):
    """A found plan that is lucky on the held-out texts must not win for that."""
    losses = MadeLosses(space(), noise=0.2)
    made(monkeypatch, losses)
    found = calibrate(config(), losses.pieces, Request(BASE, fraction=0.4), space().lengths,
                      minutes=1)  # fmt: skip
    every = [*found.fit, *found.held_out]
    bar = losses.kl(found.plans[DEFAULT], found.held_out)
    allowed = [cfg for cfg in found.plans.values() if losses.kl(cfg, found.held_out) <= bar]
    assert losses.kl(found.chosen, every) == min(losses.kl(cfg, every) for cfg in allowed)


def test_without_time_it_judges_the_default_and_an_even_spread(monkeypatch):
    losses = MadeLosses(space())
    made(monkeypatch, losses)
    found = calibrate(
        config(), losses.pieces, Request(BASE, fraction=0.4), space().lengths, minutes=0
    )
    assert {text for _, text in losses.seen} == {2, 5}  # those held out
    assert set(found.plans) == {CALIBRATED, DEFAULT, EVEN}


def test_a_kl_gives_the_fewest_reads_that_keep_it(monkeypatch):
    losses = MadeLosses(space(), noise=0.0)
    made(monkeypatch, losses)
    reads = []
    for kl in (0.06, 0.03, 0.015):
        found = calibrate(config(), losses.pieces, Request(BASE, kl=kl), space().lengths, minutes=2)
        assert losses.kl(found.chosen, found.held_out) <= kl
        reads.append(found.space.reads(found.chosen))
    assert reads == sorted(reads) and reads[0] < reads[2]
    with pytest.raises(CalibrationError, match="no plan was found that keeps a KL of 1e-09"):
        calibrate(config(), losses.pieces, Request(BASE, kl=1e-9), space().lengths, minutes=2)


def test_a_killed_run_goes_on_where_it_was(model, tmp_path):
    state = tmp_path / "state"
    whole = tiny(model, state=state)
    lines = state.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + whole.losses.passes
    state.write_text("".join(lines[:21]) + lines[21][:40])  # killed while it wrote
    again = tiny(model, state=state)
    assert again.losses.passes == whole.losses.passes - 20
    assert again.plans == whole.plans
    assert tiny(model, state=state).losses.passes == 0
    assert len(state.read_text().splitlines()) == len(lines)


def test_a_state_of_something_else_is_refused(model, tmp_path):
    state = tmp_path / "state"
    tiny(model, state=state, minutes=0)
    other = tiny_model(layers=7, initializer_range=0.3)
    with pytest.raises(CalibrationError, match="is of another model or of other texts"):
        tiny(other, state=state)
    state.write_text("a letter\n")
    with pytest.raises(CalibrationError, match="is no state of a calibration"):
        tiny(model, state=state)
    with pytest.raises(CalibrationError, match="cannot read the state"):
        tiny(model, state=tmp_path)


def test_heads_are_the_first_rows_of_a_text(model, monkeypatch):
    monkeypatch.setattr(losses_module, "HEAD_ROWS", 5)
    found = space(Request(TINY, fraction=0.6), layers=7, context=100)
    losses = Losses(model, found, pieces())
    cfg = found.default()
    (head,) = losses.heads([1])
    first, whole = losses.rows(cfg, head), losses.rows(cfg, 1)
    np.testing.assert_allclose(first.kl, whole.kl[:5], atol=1e-6)
    np.testing.assert_allclose(Losses(model, found, pieces()).rows(cfg, 1).kl, whole.kl, atol=1e-6)
