"""What is observed is what eager attention maps say, whatever the batch."""

import gc
import weakref

import numpy as np
import pytest
import torch
from calibration_cases import Tokenizer, captured, eager_steps, shift, tiny_model, token_ids
from shared_kv_models import FAMILIES, FULL_LAYERS, shared_kv_model
from transformers import GptOssConfig, GptOssForCausalLM

from deltadecode.errors import CalibrationError
from deltadecode.lab.attention_statistics import Captured, PageBudget, Shift
from deltadecode.lab.observe import Prompt, observe

SIZE, NEW = 4, 9
BUDGETS = (PageBudget(5, 2, 1), PageBudget(3, 1, 0), PageBudget(8, 0, 0))
LENGTHS = (41, 23, 30, 41)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def prompts():
    return [Prompt(i, token_ids(length, i)) for i, length in enumerate(LENGTHS)]


def measure(model, prompts, *, eos=None, layers=5, **options):
    kept = Captured(len(prompts), layers, BUDGETS, SIZE), Shift(len(prompts), layers)
    values = {"page_size": SIZE, "new_tokens": NEW, "stride": 2, "batch": 3, **options}
    observe(model, Tokenizer(eos), prompts, kept, **values)
    return kept


def test_captured_mass_and_shift_are_those_of_eager_maps(model, prompts):
    kept, shifts = measure(model, prompts)
    steps = [eager_steps(model, each.ids, NEW) for each in prompts]
    for budget in BUDGETS:
        numbers = budget.budget_pages, budget.recent_pages, budget.sink_pages
        for number, found in enumerate(steps):
            expected = captured(found, SIZE, *numbers, stride=2)
            if expected is None:
                with pytest.raises(CalibrationError, match=r"more than 8 pages of 4 tokens"):
                    kept.matrix(budget, [number])
                continue
            assert kept.steps(budget, [number]) == expected[1]
            np.testing.assert_allclose(kept.matrix(budget, [number]), expected[0], atol=1e-5)
    for number, found in enumerate(steps):
        np.testing.assert_allclose(shifts.curve([number]), shift(found, 2), atol=1e-5)
    r = kept.matrix(BUDGETS[1])
    off = r[~np.eye(5, dtype=bool)]
    assert r.diagonal().min() > off.min() + 0.05  # the layers differ: the test could fail


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_reuse_keys_are_seen_like_others(family):
    """At the first decode step too, which follows a prompt that stock runs in part only."""
    model, ids = shared_kv_model(family), token_ids(41, 0)
    kept, shifts = measure(model, [Prompt(0, ids)], layers=len(FULL_LAYERS), stride=1)
    steps = [step[list(FULL_LAYERS)] for step in eager_steps(model, ids, NEW)]
    expected, count = captured(steps, SIZE, 5, 2, 1, stride=1)
    assert count == kept.steps(BUDGETS[0]) == NEW - 1
    np.testing.assert_allclose(kept.matrix(BUDGETS[0]), expected, atol=1e-5)
    np.testing.assert_allclose(shifts.curve(), shift(steps, 1), atol=1e-5)


def test_observing_does_not_change_what_is_written(model, prompts):
    class Texts:
        seen = None

        def observe_layer(self, step):
            self.seen = step

    observer = Texts()
    observe(model, Tokenizer(), prompts[:1], [observer], page_size=SIZE, new_tokens=NEW, stride=1)
    expected = eager_steps(model, prompts[0].ids, NEW)[-1]
    np.testing.assert_allclose(observer.seen.tokens(0).numpy(), expected[-1], atol=1e-5)
    assert observer.seen.last and observer.seen.layer == 4 and observer.seen.step == NEW - 2
    assert model.config._attn_implementation != "deltadecode_policy"


def test_a_row_that_has_ended_is_left_out(model, prompts):
    free = eager_steps(model, prompts[0].ids, NEW)
    with torch.no_grad():
        ids = torch.tensor([prompts[0].ids])
        text = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    end = int(text[0, len(prompts[0].ids) + 4])  # what it writes as the fifth token, or before
    steps = eager_steps(model, prompts[0].ids, NEW, ends=[end])
    assert 0 < len(steps) < len(free)
    kept, shifts = measure(model, prompts, eos=end, stride=1)
    expected = captured(steps, SIZE, 3, 1, 0, stride=1)
    assert kept.steps(BUDGETS[1], [0]) == expected[1] == len(steps)
    np.testing.assert_allclose(kept.matrix(BUDGETS[1], [0]), expected[0], atol=1e-5)
    np.testing.assert_allclose(shifts.curve([0]), shift(steps, 1), atol=1e-5)


def test_several_texts_weigh_by_their_steps(model, prompts):
    kept, _ = measure(model, prompts)
    budget = BUDGETS[2]
    parts = [(kept.matrix(budget, [n]), kept.steps(budget, [n])) for n in (0, 2)]
    expected = sum(r * steps for r, steps in parts) / sum(steps for _, steps in parts)
    np.testing.assert_allclose(kept.matrix(budget, [0, 2]), expected)
    assert parts[0][1] != parts[1][1]


def test_nothing_of_a_step_is_held_after_it(model, prompts):
    alive = []

    class Refs:
        def observe_layer(self, step):
            alive.append(weakref.ref(step.probabilities))

    observe(model, Tokenizer(), prompts[:2], [Refs(), Captured(2, 5, BUDGETS, SIZE)],
            page_size=SIZE, new_tokens=NEW, stride=1, batch=2)  # fmt: skip
    gc.collect()
    assert len(alive) == 5 * (NEW - 1) and not any(ref() for ref in alive)


def test_progress_ends_at_one(model, prompts):
    told = []
    measure(model, prompts, progress=lambda done, left: told.append(done))
    assert told == sorted(told) and told[-1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"stride": 0}, "stride"), ({"new_tokens": 1}, "at least 2")],
)
def test_numbers_that_cannot_be(model, prompts, options, message):
    with pytest.raises(CalibrationError, match=message):
        measure(model, prompts, **options)
    with pytest.raises(CalibrationError, match="no prompts"):
        measure(model, [])


def test_learned_sinks_are_no_tokens():
    """With sinks a head's weights sum to less than 1; shares are of what lies on tokens."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=3, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["full_attention"] * 3, max_position_embeddings=256, initializer_range=0.15,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(3.0)
    ids = token_ids(30, 0)
    kept = Captured(1, 3, [PageBudget(4, 1)], SIZE)
    observe(model, Tokenizer(), [Prompt(0, ids)], [kept], page_size=SIZE, new_tokens=4, stride=1)
    steps = eager_steps(model, ids, 4)
    assert all(step.sum(axis=2).min() < 0.9 for step in steps)
    shares = [step / step.mean(axis=1, keepdims=True).sum(axis=2, keepdims=True) for step in steps]
    expected, count = captured(shares, SIZE, 4, 1, 0, stride=1)
    assert count == kept.steps(PageBudget(4, 1))
    np.testing.assert_allclose(kept.matrix(PageBudget(4, 1)), expected, atol=1e-5)
