"""The counts equal numbers worked out by hand."""

import copy
from typing import Any

import pytest
import torch
from hf_tiny import generate, make_model, make_prompt, small_config
from transformers import PreTrainedModel

import deltadecode as dd
from deltadecode import DeltaConfig, LayerPlan
from deltadecode.engines.transformers.bind import find_state
from deltadecode.engines.transformers.stats import DecodeStats


def enabled(family: str = "llama", **changes: Any) -> PreTrainedModel:
    model = make_model(family, "sdpa")
    dd.enable(model, small_config(family, **changes))
    return model


def test_before_the_first_step() -> None:
    counts = dd.stats(enabled())
    assert (counts.steps, counts.attended_tokens, counts.full_tokens) == (0, 0, 0)
    assert counts.attended_fraction == 1.0
    assert [record.layer for record in counts.per_layer] == list(range(6))


def test_numbers_worked_out_by_hand() -> None:
    model = enabled()  # P = 4, K = 5: 20 tokens
    generate(model, make_prompt(19), 6)
    # Five steps, with n = 20 (5 pages: all) and 21 to 24 (6 pages; the last holds 1 to 4 tokens).
    full = 20 + 21 + 22 + 23 + 24
    sparse = 20 + 17 + 18 + 19 + 20
    counts = dd.stats(model)
    assert counts.steps == 5
    assert counts.full_tokens == 6 * full
    assert counts.attended_tokens == 3 * full + 3 * sparse
    assert counts.attended_fraction == (3 * full + 3 * sparse) / (6 * full)
    rows = [(r.layer, r.role, r.source, r.attended_tokens, r.full_tokens) for r in counts.per_layer]
    assert rows == [
        (0, "dense", None, full, full),
        (1, "delta", None, full, full),
        (2, "sparse", 1, sparse, full),
        (3, "delta", None, full, full),
        (4, "sparse", 3, sparse, full),
        (5, "sparse", 3, sparse, full),
    ]
    assert "attended_fraction=0.9273" in repr(counts)


def test_rule11_a_budget_that_grows_counts_what_it_gives() -> None:
    model = enabled(budget_pages=4, budget_share=0.625)  # five pages of eight, six of nine
    generate(model, make_prompt(31), 5)
    full = 32 + 33 + 34 + 35
    sparse = 20 + 21 + 22 + 23
    assert dd.stats(model).full_tokens == 6 * full
    assert dd.stats(model).attended_tokens == 3 * full + 3 * sparse


def test_only_planned_layers_count() -> None:
    model = enabled("gemma3")
    generate(model, make_prompt(30), 3)
    counts = dd.stats(model)
    assert [record.layer for record in counts.per_layer] == [1, 2, 4, 5]
    assert counts.full_tokens == 4 * (31 + 32)
    assert counts.attended_tokens == 2 * (31 + 32) + 2 * (19 + 20)


def test_calls_add_up_until_reset() -> None:
    model = enabled()
    counts = dd.stats(model)
    generate(model, make_prompt(30), 3)
    once = counts.attended_tokens, counts.full_tokens
    generate(model, make_prompt(30), 3)
    assert dd.stats(model) is counts
    assert (counts.attended_tokens, counts.full_tokens) == (2 * once[0], 2 * once[1])
    counts.reset()
    assert (counts.steps, counts.attended_tokens, counts.attended_fraction) == (0, 0, 1.0)
    generate(model, make_prompt(30), 3)
    assert (counts.steps, counts.attended_tokens, counts.full_tokens) == (2, *once)
    dd.disable(model)
    generate(model, make_prompt(30), 3)
    assert (counts.steps, counts.attended_tokens, counts.full_tokens) == (2, *once)


def test_rows_count_one_by_one_and_padding_not_at_all() -> None:
    model = enabled()
    tokens = make_prompt(30, rows=2)
    mask = torch.ones_like(tokens)
    mask[1, :20] = 0
    generate(model, tokens, 3, attention_mask=mask)
    counts = dd.stats(model)
    assert counts.steps == 2
    assert counts.full_tokens == 6 * (31 + 32 + 11 + 12)
    assert counts.attended_tokens == 3 * (31 + 32 + 11 + 12) + 3 * (19 + 20 + 11 + 12)


def test_without_recent_pages_the_last_page_counts_only_if_selected() -> None:
    model = enabled(recent_pages=0, sink_pages=0)
    seen: list[int] = []
    from deltadecode.engines.transformers import planned

    stock = planned.select_pages

    def spy(scores: Any, lens: Any, cfg: Any) -> Any:
        ids, counts = stock(scores, lens, cfg)
        n = int(lens[0])
        seen.append(sum(min(4, n - 4 * page) for page in ids[0].tolist()))
        return ids, counts

    planned.select_pages = spy
    try:
        generate(model, make_prompt(40), 12)
    finally:
        planned.select_pages = stock
    one, two = seen[::2], seen[1::2]  # Δ-layers 1 and 3, step by step
    assert len(one) == 11
    assert min(seen) < 20  # some selected a partial last page, and some
    assert any(tokens == 20 and n % 4 for n, tokens in zip(range(41, 52), one, strict=True))
    read = {r.layer: r.attended_tokens for r in dd.stats(model).per_layer if r.role == "sparse"}
    assert read == {2: sum(one), 4: sum(two), 5: sum(two)}


def test_a_prompt_of_one_token_is_no_step() -> None:
    model = enabled()
    generate(model, make_prompt(1), 4)
    assert dd.stats(model).steps == 3
    assert dd.stats(model).full_tokens == 6 * (2 + 3 + 4)


def test_rule1_nothing_survives_a_step_not_even_one_that_failed() -> None:
    model = enabled()
    with torch.no_grad():
        cache = model(make_prompt(30)).past_key_values
        expected = model(make_prompt(1), past_key_values=copy.deepcopy(cache)).logits
        assert find_state(model).local.step is None
        broken = model.model.layers[4].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(make_prompt(1, seed=1), past_key_values=copy.deepcopy(cache))
        broken.remove()
        assert torch.equal(model(make_prompt(1), past_key_values=cache).logits, expected)
    assert dd.stats(model).steps == 3


def test_the_counts_alone() -> None:
    plan = DeltaConfig(dense_layers=(), delta_layers=(0,)).layer_plan(2)
    assert isinstance(plan, LayerPlan)
    counts = DecodeStats(plan)
    counts.add_step(6, 5)
    counts.add_step(4, 3)
    counts.add_unread(0, torch.tensor(3))
    counts.add_unread(0, torch.tensor(1))
    assert [r.attended_tokens for r in counts.per_layer] == [10, 4]
    assert counts.attended_fraction == pytest.approx(0.7)
