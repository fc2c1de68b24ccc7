"""The step timing times what it says: the same weights and cache on both sides."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from deltadecode import DeltaCache, enable, stats
from deltadecode.lab.steptime import (
    PLAN,
    StepTimer,
    decode_step,
    fill_cache,
    qwen2_05b,
    random_model,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_model_is_finite_and_of_the_wanted_dtype(tiny_shape, dtype):
    model = random_model(tiny_shape, dtype)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert not any(weight.is_meta for weight in (*model.parameters(), *model.buffers()))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    cache = DynamicCache(config=model.config)
    fill_cache(cache, tiny_shape, 40, dtype)
    logits = decode_step(model, cache)
    assert logits.isfinite().all()
    assert logits.std() > 0
    assert cache.get_seq_length() == 41


def test_both_sides_share_weights_and_agree_when_the_budget_covers_the_cache(tiny_shape):
    full = random_model(tiny_shape, torch.float32)
    delta = random_model(tiny_shape, torch.float32, like=full)
    assert delta.lm_head.weight.data_ptr() == full.lm_head.weight.data_ptr()
    enable(delta, PLAN)
    logits = []
    for model, cache in (
        (full, DynamicCache(config=full.config)),
        (delta, DeltaCache(full.config)),
    ):
        fill_cache(cache, tiny_shape, 500, torch.float32)
        logits.append(decode_step(model, cache))
    torch.testing.assert_close(*logits)


def test_measure_decodes_with_the_plan(tiny_shape):
    timer = StepTimer(tiny_shape, torch.float32)
    pairs = []
    small = replace(PLAN, budget_pages=10)
    found = timer.measure(640, small, steps=3, warmup=1, on_step=lambda: pairs.append(1))
    assert (found.context, found.steps, len(pairs)) == (640, 3, 4)
    assert found.full_ms > 0 and found.delta_ms > 0
    assert found.ratio == pytest.approx(found.full_ms / found.delta_ms)
    assert stats(timer.delta).steps == 4
    # 5 of 20 layers read everything, the others 10 pages of 41.
    assert stats(timer.delta).attended_fraction == pytest.approx(0.25 + 0.75 * 10 / 41, abs=0.02)
    with pytest.raises(ValueError, match="not enabled"):
        stats(timer.full)


def test_default_shape_is_that_of_qwen2_05b():
    config = qwen2_05b()
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (896, 4864, 151936)
    assert (config.num_hidden_layers, config.num_attention_heads) == (24, 14)
    assert config.num_key_value_heads == 2
    assert PLAN.layer_plan(24).role(23) == "sparse"
