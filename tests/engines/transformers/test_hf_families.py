"""Every family: full attention where the budget covers all pages, DELTA's definition elsewhere."""

from fractions import Fraction

import pytest
import torch
from hf_slow_delta import NAME, Rules, slow_logits
from hf_tiny import (
    FAMILIES,
    HYBRID,
    generate,
    make_model,
    make_prompt,
    small_config,
    sources,
    stock_name,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

import deltadecode as dd
from deltadecode.engines.transformers.layers import DeltaLayer

PROMPT, STEPS = 23, 24


@pytest.mark.parametrize("family", FAMILIES)
def test_rule3_a_budget_for_all_pages_gives_the_logits_of_full_attention(family: str) -> None:
    prompt = make_prompt(PROMPT)
    expected = generate(make_model(family, stock_name(family)), prompt, STEPS)
    model = make_model(family, stock_name(family))
    dd.enable(model, small_config(family, budget_pages=64))
    got = generate(model, prompt, STEPS)
    assert torch.equal(got.sequences, expected.sequences)
    # float32 rounding, through six layers with large weights; logits are of the order of 10.
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(expected.logits), atol=2e-3, rtol=0
    )
    assert dd.stats(model).attended_fraction == 1.0


@pytest.mark.parametrize(("seed", "sink"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_budget_gives_what_the_slow_delta_of_the_tests_gives(
    family: str, seed: int, sink: int
) -> None:
    prompt = make_prompt(PROMPT, seed=seed)
    model = make_model(family, stock_name(family), seed).double()
    dd.enable(model, small_config(family, sink_pages=sink))
    got = generate(model, prompt, STEPS)
    rules = Rules(page=4, budget=5, recent=2, sink=sink, sparse=sources(family))
    slow = make_model(family, NAME, seed).double()
    text = got.sequences[:, :-1]
    expected = slow_logits(slow, text, range(PROMPT, text.shape[1]), rules)[PROMPT - 1 :]
    # In float64, so that only another selection could make a difference; generate gives logits in
    # float32, and so are norms and rotary embeddings inside the models.
    torch.testing.assert_close(torch.cat(got.logits), expected.float(), atol=1e-4, rtol=0)
    read = {r.layer: r.attended_tokens for r in dd.stats(model).per_layer if r.role == "sparse"}
    assert read == rules.tokens_read
    full = generate(make_model(family, stock_name(family), seed).double(), prompt, STEPS)
    assert (torch.cat(full.logits) - expected).abs().max() > 1


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_rule4_a_budget_that_grows_with_the_context(family: str, share: float) -> None:
    """From 6 pages, where K or the whole context is more, to 12."""
    model = make_model(family, stock_name(family)).double()
    dd.enable(model, small_config(family, budget_pages=4, budget_share=share))
    got = generate(model, make_prompt(PROMPT), STEPS)
    rules = Rules(page=4, budget=4, recent=2, sink=1, sparse=sources(family))
    rules.share = Fraction(str(share))
    slow = make_model(family, NAME).double()
    text = got.sequences[:, :-1]
    expected = slow_logits(slow, text, range(PROMPT, text.shape[1]), rules)[PROMPT - 1 :]
    torch.testing.assert_close(torch.cat(got.logits), expected.float(), atol=1e-4, rtol=0)
    read = {r.layer: r.attended_tokens for r in dd.stats(model).per_layer if r.role == "sparse"}
    assert read == rules.tokens_read
    fewer = Rules(page=4, budget=4, recent=2, sink=1, sparse=sources(family))
    other = slow_logits(slow, text, range(PROMPT, text.shape[1]), fewer)[PROMPT - 1 :]
    assert (other - expected).abs().max() > 1


@pytest.mark.parametrize("family", HYBRID)
def test_rule8_sliding_window_layers_keep_their_class_and_are_not_planned(family: str) -> None:
    model = make_model(family, stock_name(family))
    dd.enable(model, small_config(family))
    cache = generate(model, make_prompt(PROMPT), 4).past_key_values
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [DynamicSlidingWindowLayer, DeltaLayer, DeltaLayer] * 2
    assert cache.layers[0].keys.shape[2] == 11  # the window of 12 less the next token
    assert [record.layer for record in dd.stats(model).per_layer] == [1, 2, 4, 5]
