"""Lossless mode from a static cache: what the dynamic one gives, in passes of fixed shapes."""

from typing import Any

import pytest
import torch
from hf_tape import taped_graphs
from hf_tiny import generate, make_model, make_prompt, small_config
from test_hf_lossless import (
    SAMPLING,
    STEPS,
    left_padded,
    models,
    refused,
    same,
)

import deltadecode as dd

STATIC = {"cache_implementation": "static"}


def counts(model: Any) -> tuple[Any, ...]:
    seen = dd.stats(model)
    result = seen.drafted, seen.verified, seen.accepted, seen.steps, seen.per_layer
    seen.reset()
    return result


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"recent_pages": 0}),  # the last page need not be among the selected ones
        ("llama", {"budget_share": 0.5}),
        ("gemma2", {}),
        ("gpt_oss", {"recent_pages": 0}),
    ],
)
def test_tokens_and_counts_are_those_of_the_dynamic_cache(family: str, changes: Any) -> None:
    stock, ours = models(family, 4, **changes)
    tokens, mask = left_padded()
    for options in ({}, {"attention_mask": mask}):
        inputs = tokens if options else make_prompt(23)
        generate(ours, inputs, STEPS, **options)
        expected = counts(ours)
        got = generate(ours, inputs, STEPS, **options, **STATIC)
        assert isinstance(got.past_key_values, dd.DeltaStaticCache)
        same(got, generate(stock, inputs, STEPS, **options))
        assert counts(ours) == expected
        assert 0 < expected[2] < expected[1]  # some drafts were wrong


def test_a_seed_gives_the_samples_of_the_dynamic_cache() -> None:
    _, ours = models(draft_tokens=2)
    texts = []
    for options in ({}, STATIC):
        torch.manual_seed(1)
        prompt = make_prompt(40).expand(40, -1)
        texts.append(ours.generate(prompt, max_new_tokens=STEPS, **options, **SAMPLING))
    assert torch.equal(*texts)
    accepted, verified = dd.stats(ours).accepted, dd.stats(ours).verified
    assert 0 < accepted < verified


def test_a_second_turn_in_a_cache_of_the_users_own() -> None:
    stock, ours = models()
    tokens, mask = left_padded((23, 30))
    turn = torch.cat([make_prompt(5, seed=9), make_prompt(5, seed=8)])
    results = []
    for model in (ours, stock):
        cache = dd.DeltaStaticCache(ours.config, 56) if model is ours else None
        one = generate(model, tokens, 10, attention_mask=mask, past_key_values=cache)
        text = torch.cat([one.sequences, turn], dim=1)
        more = torch.cat([mask, torch.ones(2, 15, dtype=torch.long)], dim=1)
        options = {"past_key_values": one.past_key_values, "attention_mask": more}
        # The last token finds the cache full: no draft has room beside it.
        results.append(generate(model, text, 12, **options))
    same(*results)
    assert int(results[0].past_key_values.get_seq_length()) == 56
    with pytest.raises(ValueError, match="room for 56 tokens, got 57"):
        generate(ours, make_prompt(40, 2), 18, past_key_values=dd.DeltaStaticCache(ours.config, 56))


def test_rings_of_sliding_windows_cannot_take_drafts_back() -> None:
    stock, ours = models("gemma3")
    cache = dd.DeltaStaticCache(ours.config, 64)
    refused("lossless=True", lambda: generate(ours, make_prompt(9), 4, past_key_values=cache))
    cache = dd.DeltaStaticCache(ours.config, 64, lossless=True)
    prompt = make_prompt(30)
    same(generate(ours, prompt, 20, past_key_values=cache), generate(stock, prompt, 20))


def test_a_model_that_drops_weights_decodes_with_full_attention() -> None:
    model = make_model("llama", "sdpa", attention_dropout=0.2)
    dd.enable(model, small_config(), lossless=True)
    model.train()
    out = generate(model, make_prompt(40), STEPS, **STATIC)
    assert out.sequences.shape[1] == 40 + STEPS and dd.stats(model).drafted == 0


@pytest.mark.parametrize(("family", "draft_tokens"), [("llama", 6), ("llama", None), ("gemma3", 1)])
def test_captured_passes_give_what_plain_ones_give(family: str, draft_tokens: int | None) -> None:
    stock, ours = models(family, draft_tokens)
    tokens, mask = left_padded()
    cache = dd.DeltaStaticCache(ours.config, 60 + 16, lossless=True)
    expected = generate(stock, tokens, STEPS, attention_mask=mask)
    with taped_graphs() as graphs:
        got = generate(ours, tokens, STEPS, attention_mask=mask, past_key_values=cache)
        same(got, expected)
        made, runs = len(graphs), sum(graph.replays for graph in graphs)
        # All but the first pass.
        assert runs == dd.stats(ours).steps - 1
        assert 2 <= made <= (3 if draft_tokens else 6)
        # Other rows in the same cache find everything captured.
        cache.empty()
        tokens, mask = left_padded((34, 30, 2, 7, 19))
        got = generate(ours, tokens, STEPS, attention_mask=mask, past_key_values=cache)
        same(got, generate(stock, tokens, STEPS, attention_mask=mask))
        assert len(graphs) - made <= (0 if draft_tokens else 4)
    assert dd.stats(ours).drafted > 0


def test_the_next_call_takes_over_a_cache_that_nobody_holds() -> None:
    stock, ours = models()
    prompts = [make_prompt(30 + seed, 2, seed) for seed in range(4)]
    options = {**STATIC, "max_cache_len": 70}
    with taped_graphs() as graphs:
        made, outputs = [], []
        for prompt in prompts:
            out = generate(ours, prompt, 9, **options)
            same(out, generate(stock, prompt, 9))
            outputs.append(out.past_key_values if len(made) == 1 else None)
            del out
            made.append(len(graphs))
        # The second call runs the graphs of the first. Its cache is held, and stays as it is.
        assert 0 < made[0] == made[1] < made[2] == made[3]
        held = [layer.keys.clone() for layer in outputs[1].layers]
        generate(ours, prompts[0], 9, **options)
        assert all(map(torch.equal, held, (layer.keys for layer in outputs[1].layers)))
        # Other rows, and other weights in another place.
        captured = len(graphs)
        for model in (ours, stock):
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0))
        same(generate(ours, prompts[0], 9, **options), generate(stock, prompts[0], 9))
        same(generate(ours, prompts[0][:1], 9, **options), generate(stock, prompts[0][:1], 9))
        assert len(graphs) >= captured + 4


def test_a_model_that_waits_for_the_device_is_not_captured() -> None:
    stock, ours = models()

    def wait(module: Any, args: Any) -> None:
        int(args[0].argmax())

    ours.model.layers[2].register_forward_pre_hook(wait)
    prompt = make_prompt(40)
    with taped_graphs() as graphs:
        with pytest.warns(UserWarning, match="without CUDA graphs: LlamaForCausalLM cannot"):
            got = generate(ours, prompt, STEPS, **STATIC)
        same(got, generate(stock, prompt, STEPS))
        assert not graphs
        generate(ours, prompt, STEPS, disable_compile=True, **STATIC)


def test_forward_outside_of_generate_is_full_attention_also_compiled() -> None:
    stock, ours = models()
    torch._dynamo.reset()
    cache = dd.DeltaStaticCache(ours.config, 60)
    step = torch.compile(ours.forward, backend="aot_eager")
    past = None
    for tokens in [make_prompt(40), *make_prompt(4, seed=3).split(1, dim=1)]:
        with torch.no_grad():
            expected = stock(tokens, past_key_values=past)
            got = (ours if past is None else step)(input_ids=tokens, past_key_values=cache)
        past = expected.past_key_values
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-6, rtol=0)
    assert dd.stats(ours).steps == 0
