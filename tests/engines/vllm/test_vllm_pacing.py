"""How many drafts the scheduler asks for: by bytes, by acceptance and by what steps take."""

from types import SimpleNamespace

import pytest
import torch

from deltadecode import DeltaConfig
from deltadecode.engines.serving.settings import ServingSettings, budget_tokens
from deltadecode.engines.vllm import pacing

CONFIG = DeltaConfig(16, 64, 8, 1, (), (0,))
DRAFTS, ROWS = 4, 8
BUDGET = budget_tokens(CONFIG)


def settings(min_tokens=BUDGET):
    return ServingSettings(CONFIG, CONFIG.layer_plan(4), min_tokens=min_tokens)


class Engine:
    """A scheduler whose steps take what they are told to, one decided before the last ended."""

    def __init__(self, monkeypatch, tokens, min_tokens=BUDGET, launcher="mp"):
        self.now, self.running = (
            0.0,
            [SimpleNamespace(num_tokens=tokens, request_id=str(row)) for row in range(ROWS)],
        )
        self.num_spec_tokens = DRAFTS
        text = SimpleNamespace(
            num_hidden_layers=4, hidden_size=64, num_attention_heads=4, intermediate_size=128
        )
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(
                hf_text_config=text, dtype=torch.bfloat16, get_total_num_kv_heads=lambda: 2,
                get_head_size=lambda: 16, get_vocab_size=lambda: 1000,
            ),
            cache_config=SimpleNamespace(cache_dtype="auto"),
            scheduler_config=SimpleNamespace(async_scheduling=True),
            parallel_config=SimpleNamespace(distributed_executor_backend=launcher),
        )  # fmt: skip
        monkeypatch.setattr(pacing, "clock", lambda: self.now)
        pacing.pace_drafts(self, settings(min_tokens))
        self.drafted = 0

    def update_from_output(self, step, output):
        return "outputs"

    def run(self, steps, *, plain=1.0, draft=0.25, verify=1.1, kept=4):
        """Tokens of a row, seconds, and how many steps drafted."""
        tokens = seconds = count = 0
        names = [str(row) for row in range(ROWS)]
        for _ in range(steps):
            verified, self.drafted = self.drafted, self.dynamic_sd_lookup[ROWS]
            given = min(kept, 1 + verified)
            taken = (verify if verified else plain) + self.drafted * draft
            self.now, seconds = self.now + taken, seconds + taken
            step = SimpleNamespace(
                scheduled_spec_decode_tokens={name: [-1] * verified for name in names if verified},
                num_scheduled_tokens=dict.fromkeys(names, 1 + verified),
                total_num_scheduled_tokens=ROWS * (1 + verified),
                num_spec_tokens_to_schedule=self.drafted,
                finished_req_ids=set(),
            )
            output = SimpleNamespace(
                req_id_to_index={name: int(name) for name in names},
                sampled_token_ids=[[7] * given] * ROWS,
            )
            assert type(self).update_from_output(self, step, output) == "outputs"
            assert self.__dict__["update_from_output"](step, output) == "outputs"
            tokens, count = tokens + given, count + bool(self.drafted)
        return tokens, seconds, count


def test_a_scheduler_reserves_slots_for_drafts_and_decides_on_them(monkeypatch):
    engine = Engine(monkeypatch, 6000, min_tokens=0)
    assert engine.num_lookahead_tokens == DRAFTS
    assert engine.dynamic_sd_lookup[ROWS] == DRAFTS
    engine.running = []
    assert engine.dynamic_sd_lookup[1] == 0


def test_min_tokens_alone_decides_and_nothing_is_measured(monkeypatch):
    for name in ("measure", "rest", "_faded"):
        monkeypatch.setattr(pacing.Acceptance, name, lambda *_: pytest.fail("it is measured"))
    engine = Engine(monkeypatch, 3000, min_tokens=2000)
    assert engine.run(50, draft=9.0, kept=1)[2] == 50
    assert Engine(monkeypatch, 3000, min_tokens=4000).run(50)[2] == 0


def test_nothing_is_drafted_or_timed_within_the_budget(monkeypatch):
    engine = Engine(monkeypatch, 1000)
    assert engine.run(200) == (200, 200.0, 0)


def test_rule12_drafts_that_pay_go_on_and_are_compared_now_and_then(monkeypatch):
    tokens, seconds, drafted = Engine(monkeypatch, 6000).run(2000)
    assert seconds / tokens < 0.6
    assert 1900 < drafted < 2000


@pytest.mark.parametrize("slow", [{"draft": 1.0}, {"verify": 4.0}, {"kept": 1}])
def test_rule12_drafts_that_take_longer_than_they_give_end(monkeypatch, slow):
    tokens, seconds, drafted = Engine(monkeypatch, 6000).run(3000, **slow)
    assert 0 < drafted < 200
    assert seconds / tokens < 1.06


def test_rule12_trials_of_drafts_take_little_of_the_first_steps(monkeypatch):
    # Four tokens take a tenth longer than from plain steps.
    tokens, seconds, _ = Engine(monkeypatch, 6000).run(150, verify=4.4 - DRAFTS * 0.25)
    assert seconds / tokens < 1.025


def test_rule12_drafts_begin_when_they_pay(monkeypatch):
    engine = Engine(monkeypatch, 6000)
    engine.run(1000, draft=1.0)
    assert engine.run(2000)[2] > 1200


def test_ranks_that_decide_alone_leave_the_clock_out(monkeypatch):
    engine = Engine(monkeypatch, 6000, launcher="external_launcher")
    assert engine.run(200, draft=9.0)[2] == 200


def test_placeholders_of_a_request_that_waits_go(monkeypatch):
    engine = Engine(monkeypatch, 1000)
    engine.running[3].spec_token_ids = [-1] * DRAFTS
    engine.run(1)
    assert engine.running[3].spec_token_ids == []


def test_a_batch_that_grows_goes_on_drafting(monkeypatch):
    engine = Engine(monkeypatch, 8000)
    engine.run(100)
    for request in engine.running:
        request.num_tokens = 8200  # 2 ** 16 in all are passed
    assert engine.run(15)[2] == 15
    assert engine.run(100, draft=2.0)[2] < 30  # and is compared soon
    assert len(engine.dynamic_sd_lookup._shapes) == 2


def test_a_pause_and_a_prompt_say_nothing_of_steps(monkeypatch):
    engine = Engine(monkeypatch, 6000)
    engine.run(40)
    (times,) = engine.dynamic_sd_lookup._shapes.values()
    known = list(times.plain), list(times.rounds)
    running, engine.running = engine.running, []
    engine.now += 1000  # all have ended
    engine.dynamic_sd_lookup.pause()
    engine.running = running
    engine.run(1)
    assert [*times.plain, *(seconds for seconds, _ in times.rounds)][-1] < 10
    assert (list(times.plain), list(times.rounds)) == known


def test_an_engine_that_is_held_up_goes_on_drafting(monkeypatch):
    engine = Engine(monkeypatch, 6000)
    engine.run(40)
    for _ in range(10):
        engine.now += 1000  # as while nobody asks for the next step
        assert engine.run(10)[2] >= 6  # but for a few plain steps to compare with


def test_bytes_of_a_step(monkeypatch):
    config = Engine(monkeypatch, 1).vllm_config
    layer = 2 * 64 * 16 * (4 + 2) + 3 * 64 * 128
    assert pacing.step_bytes(config) == (2 * (4 * layer + 64 * 1000), 2 * 4 * 2 * 16 * 2)
    config.cache_config.cache_dtype = "fp8"
    config.model_config.hf_text_config.num_experts_per_tok = 3
    config.model_config.hf_text_config.moe_intermediate_size = 32
    layer = 2 * 64 * 16 * (4 + 2) + 3 * 64 * 32 * 3
    assert pacing.step_bytes(config) == (2 * (4 * layer + 64 * 1000), 2 * 4 * 2 * 16)
