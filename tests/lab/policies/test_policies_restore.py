"""A policy sets its own attention, and gives back what was there."""

import copy
from typing import Any

import pytest
import torch
from policy_cases import VOCAB, tiny_model

import deltadecode as dd
from deltadecode.lab.policies import make_policy

PROMPT = 60
PLAN = dd.DeltaConfig(
    page_size=4, budget_pages=5, recent_pages=2, dense_layers=(0,), delta_layers=(1, 3)
)


def make_model(attention: str) -> Any:
    model = tiny_model()
    model.set_attn_implementation(attention)
    return model


def make_prompt(tokens: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0))


def generate(model: Any, prompt: torch.Tensor, steps: int, **options: Any) -> Any:
    return model.generate(
        prompt,
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


@pytest.mark.parametrize("name", ["full", "delta:recent_pages=1:page_size=8", "streaming", "quest"])
def test_an_enabled_model_decodes_as_the_policy_says_and_stays_enabled(name: str) -> None:
    prompt = make_prompt(PROMPT)
    model = make_model("eager")
    policy = make_policy(name, model, 32)
    with policy.decoding(model):
        cache = dd.DeltaCache(model.config)
        expected = generate(model, prompt, 8, past_key_values=cache).logits
    assert model.config._attn_implementation == "eager"

    dd.enable(model, PLAN)
    alone = generate(model, prompt, 8).logits
    counts, read = dd.stats(model), dd.stats(model).attended_tokens
    with policy.decoding(model):
        cache = dd.DeltaCache(model.config)
        got = generate(model, prompt, 8, past_key_values=cache).logits
    assert torch.equal(torch.cat(got), torch.cat(expected))
    assert counts.attended_tokens == read
    assert dd.stats(model) is counts
    assert torch.equal(torch.cat(generate(model, prompt, 8).logits), torch.cat(alone))
    dd.disable(model)
    assert model.config._attn_implementation == "eager"


def test_a_copy_of_the_model_decodes_with_the_policy_of_its_own() -> None:
    model = make_model("sdpa")
    twin = copy.deepcopy(model)
    one, other = make_policy("streaming", model, 32), make_policy("full", twin, 32)
    with one.decoding(model), other.decoding(twin):
        first = generate(model, make_prompt(PROMPT), 8).sequences
        second = generate(twin, make_prompt(PROMPT), 8).sequences
    assert not torch.equal(first, second)
