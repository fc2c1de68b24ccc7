"""Lossless mode from a static cache on a GPU: drafts and verifications in CUDA graphs."""

import warnings

import pytest
import torch
from test_gpu_transformers import CFG, FAMILIES, SHAPE, STEPS, left_padded, make
from transformers import AutoModelForCausalLM, Gemma3TextConfig

import deltadecode as dd
from deltadecode.engines.transformers import passes

pytestmark = pytest.mark.gpu
OPTIONS = {"max_new_tokens": STEPS, "return_dict_in_generate": True}
STATIC = {"cache_implementation": "static"}


@pytest.fixture
def graphs(monkeypatch):
    """Counts captures and replays."""
    seen = {"captured": 0, "replayed": 0}

    class Counted(passes.Graph):
        def __init__(self, *args):
            super().__init__(*args)
            seen["captured"] += 1

        def replay(self):
            seen["replayed"] += 1
            return super().replay()

    monkeypatch.setattr(passes, "Graph", Counted)
    return seen


def full(model, tokens, mask):
    dd.disable(model)
    return model.generate(
        tokens, attention_mask=mask, do_sample=False, output_logits=True, **OPTIONS
    )


@pytest.mark.parametrize("draft_tokens", [1, 4, 16, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_full_attentions(family, draft_tokens, graphs):
    model = make(family, torch.float32)
    tokens, mask = left_padded()
    expected = full(model, tokens, mask)
    dd.enable(model, CFG, lossless=True, draft_tokens=draft_tokens)
    for _ in range(3):  # also from graphs of the call before
        dd.stats(model).reset()
        got = model.generate(
            tokens, attention_mask=mask, do_sample=False, output_logits=True, **OPTIONS, **STATIC
        )
        assert torch.equal(got.sequences, expected.sequences)
        logits = torch.stack(got.logits)
        torch.testing.assert_close(logits, torch.stack(expected.logits), rtol=1e-3, atol=1e-3)
        counts = dd.stats(model)
        assert 0 < counts.accepted <= counts.verified <= counts.drafted
        del got  # else the next call would need a cache of its own
    # The first pass of each call is not captured.
    assert graphs["replayed"] >= 2 * (counts.steps - 1)
    assert graphs["captured"] <= (3 if draft_tokens else 6)


def test_sliding_windows():
    torch.manual_seed(0)
    windows = {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"] * 2,
        "sliding_window": 40,
        "query_pre_attn_scalar": 64,
    }
    config = Gemma3TextConfig(**{**SHAPE, **windows})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = model.to("cuda", torch.float32).eval()
    tokens, mask = left_padded()
    expected = full(model, tokens, mask)
    plan = dd.DeltaConfig(16, 6, 2, 1, (), (1, 4))
    dd.enable(model, plan, lossless=True, draft_tokens=4)
    got = model.generate(tokens, attention_mask=mask, do_sample=False, **OPTIONS, **STATIC)
    assert torch.equal(got.sequences, expected.sequences)
    assert dd.stats(model).accepted > 0


def test_bfloat16_greedy_and_sampling(graphs):
    model = make("llama", torch.bfloat16)
    tokens, mask = left_padded()
    dd.enable(model, CFG, lossless=True)
    for do_sample in (False, True):
        texts = []
        for _ in range(2):
            torch.manual_seed(5)
            out = model.generate(
                tokens, attention_mask=mask, do_sample=do_sample, **OPTIONS, **STATIC
            )
            texts.append(out.sequences)
        assert texts[0].shape == (len(tokens), tokens.shape[1] + STEPS)
        assert not do_sample or torch.equal(*texts)
    assert dd.stats(model).accepted > 0 and graphs["replayed"] > 0


def test_a_second_turn_runs_the_graphs_of_the_first(graphs):
    model = make("llama", torch.float32)
    tokens, mask = left_padded()
    expected = full(model, tokens, mask).sequences
    dd.enable(model, CFG, lossless=True, draft_tokens=4)
    width = tokens.shape[1]
    cache = dd.DeltaStaticCache(model.config, width + STEPS + 16)
    half, captured = STEPS // 2, []
    options = {"do_sample": False, "return_dict_in_generate": True, "past_key_values": cache}
    for end in (half, STEPS):
        more = torch.nn.functional.pad(mask, (0, end - half), value=1)
        tokens = model.generate(
            tokens, attention_mask=more, max_new_tokens=half, **options
        ).sequences
        captured.append(graphs["captured"])
    assert torch.equal(tokens, expected)
    assert captured[0] == captured[1] > 0


def test_without_graphs_where_they_are_not_wanted_or_cannot_be(graphs):
    tokens, mask = left_padded()
    model = make("llama", torch.float32)
    expected = full(model, tokens, mask).sequences
    dd.enable(model, CFG, lossless=True, draft_tokens=4)
    options = {"attention_mask": mask, "do_sample": False, **OPTIONS, **STATIC}
    got = model.generate(tokens, disable_compile=True, **options).sequences
    assert torch.equal(got, expected) and graphs["captured"] == 0

    def wait(module, args):
        int(args[0].argmax())

    hook = model.model.layers[2].register_forward_pre_hook(wait)
    with pytest.warns(UserWarning, match="without CUDA graphs: LlamaForCausalLM"):
        got = model.generate(tokens, **options).sequences
    assert torch.equal(got, expected) and graphs["replayed"] == 0
    hook.remove()
    assert torch.rand(3, device="cuda").isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = model.generate(tokens, **options).sequences
    assert torch.equal(got, expected) and graphs["replayed"] > 0
