"""Kinds of model whose attention is not what their configuration suggests: right, or refused."""

from typing import Any

import pytest
import torch
from hf_slow_delta import NAME, Rules, slow_logits
from hf_tiny import COMMON, FAMILIES, GREEDY, generate, make_model, make_prompt, small_config
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BartConfig,
    BartForCausalLM,
    DiffLlamaConfig,
    DynamicCache,
    Gemma3Config,
    Gemma4TextConfig,
    MiniMaxConfig,
    MllamaForCausalLM,
    MllamaTextConfig,
    PreTrainedModel,
    Qwen2_5OmniForConditionalGeneration,
)

import deltadecode as dd

PROMPT, STEPS = 23, 12


def seeded(make: Any, *args: Any, **kwargs: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return make(*args, **kwargs).eval()


def refused(model: PreTrainedModel, *parts: str) -> None:
    with pytest.raises(dd.UnsupportedModelError) as caught:
        dd.enable(model)
    assert "\n" not in str(caught.value)
    for part in (type(model).__name__, *parts):
        assert part in str(caught.value)
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_two_attention_calls_a_layer_are_refused() -> None:
    values = {**COMMON, "num_hidden_layers": 4}
    refused(seeded(AutoModelForCausalLM.from_config, DiffLlamaConfig(**values)), "once a step")


def test_a_cache_class_of_the_models_own_is_refused() -> None:
    values = {**COMMON, "layer_types": ["full_attention", "linear_attention"] * 3}
    config = MiniMaxConfig(**values, num_local_experts=2, num_experts_per_tok=1, block_size=8)
    refused(seeded(AutoModelForCausalLM.from_config, config), "cache")


MLLAMA = {"cross_attention_layers": [2, 4], "rope_parameters": {"rope_type": "default"}}


def make_mllama(attention: str = "sdpa") -> PreTrainedModel:
    config = MllamaTextConfig(**{**COMMON, **MLLAMA, "rope_theta": 1e4})
    config._attn_implementation = attention
    model = seeded(MllamaForCausalLM, config).double()
    with torch.no_grad():  # closed in a new model
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.5)
    return model


def test_cross_attention_layers_are_no_part_of_the_plan() -> None:
    prompt = make_prompt(PROMPT)
    picture = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0)).double()

    def run(model: PreTrainedModel) -> torch.Tensor:
        seen = torch.ones(1, 1, PROMPT, 1).double()
        options = {"full_text_row_masked_out_mask": seen}
        with torch.no_grad():
            out = model(prompt, cross_attention_states=picture, **options)
            logits = [out.logits[:, -1]]
            for token in range(3, 15):
                step = torch.full((1, 1), token)
                options = {"full_text_row_masked_out_mask": seen[:, :, :1]}
                out = model(step, past_key_values=out.past_key_values, **options)
                logits.append(out.logits[:, -1])
        return torch.cat(logits)

    expected = run(make_mllama())
    model = make_mllama()
    plan = {"dense_layers": (0,), "delta_layers": (1,)}
    dd.enable(model, small_config(budget_pages=64, **plan))
    torch.testing.assert_close(run(model), expected)
    dd.enable(model, small_config(**plan))
    assert not torch.allclose(run(model), expected, atol=0.1)
    stats = dd.stats(model)
    assert [record.layer for record in stats.per_layer] == [0, 1, 3, 5]
    assert stats.steps == 12
    assert stats.attended_fraction < 1


OMNI_TEXT = {**COMMON, "layer_types": ["full_attention"] * 6}


def make_omni() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    thinker = {
        "text_config": {**OMNI_TEXT, "rope_parameters": rope},
        "audio_config": {**audio, "encoder_ffn_dim": 16, "output_dim": 32},
        "vision_config": {**vision, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
    }
    config = AutoConfig.for_model("qwen2_5_omni", thinker_config=thinker, enable_audio_output=False)
    config.thinker_config.vision_start_token_id = 59
    return seeded(Qwen2_5OmniForConditionalGeneration, config)


def test_a_decoder_deep_inside_nested_configurations_is_found() -> None:
    model = make_omni()
    dd.enable(model, small_config())
    out = generate(model.thinker, make_prompt(PROMPT), STEPS)
    assert isinstance(out.past_key_values, dd.DeltaCache)
    assert dd.stats(model).steps == STEPS - 1
    assert dd.stats(model).attended_fraction < 1
    dd.disable(model)
    full = generate(model.thinker, make_prompt(PROMPT), STEPS)
    assert not torch.equal(torch.cat(out.logits), torch.cat(full.logits))


def make_vision(attention: Any) -> PreTrainedModel:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = Gemma3Config(
        text_config={**COMMON, **FAMILIES["gemma3"][1]},
        vision_config={**vision, "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_id=60,
    )
    make = AutoModelForImageTextToText.from_config
    return seeded(make, config, attn_implementation=attention)


@pytest.mark.parametrize("attention", ["delta", {"": "delta"}, {"text_config": "delta"}])
@pytest.mark.parametrize("later", [False, True])
def test_every_form_of_the_name_on_a_vision_language_model(attention: Any, later: bool) -> None:
    model = make_vision("sdpa" if later else attention)
    if later:
        model.set_attn_implementation(attention)
    out = model.generate(make_prompt(3), max_new_tokens=4, **GREEDY)
    assert isinstance(out.past_key_values, dd.DeltaCache)
    counts = dd.stats(model)
    assert counts.steps == 3
    dd.disable(model)
    assert {
        part.config._attn_implementation
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
    } == {"sdpa"}


def make_gemma4(attention: str) -> PreTrainedModel:
    config = Gemma4TextConfig(
        **{**COMMON, "layer_types": ["full_attention"] * 6, "sliding_window": 12},
        num_kv_shared_layers=3,
        num_global_key_value_heads=2,
        global_head_dim=8,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=61,
        enable_moe_block=False,
    )
    return seeded(AutoModelForCausalLM.from_config, config, attn_implementation=attention).double()


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_shared_keys_and_a_prompt_of_which_the_last_logits_are_kept(keep: int) -> None:
    stock, model = make_gemma4("sdpa"), make_gemma4("sdpa")
    dd.enable(model, small_config(dense_layers=(), delta_layers=(0, 3)))
    for tokens in (17, 45):  # within the budget and past it
        prompt = make_prompt(tokens)
        with torch.no_grad():
            expected = stock(prompt, logits_to_keep=keep).logits
            torch.testing.assert_close(model(prompt, logits_to_keep=keep).logits, expected)
    assert dd.stats(model).steps == 0


def test_shared_keys_and_a_static_cache() -> None:
    model = make_gemma4("sdpa")
    dd.enable(model, small_config(dense_layers=(), delta_layers=(0, 3)))
    expected = generate(model, make_prompt(PROMPT), STEPS)
    counts = dd.stats(model).per_layer
    dd.stats(model).reset()
    got = generate(model, make_prompt(PROMPT), STEPS, cache_implementation="static")
    torch.testing.assert_close(torch.cat(got.logits), torch.cat(expected.logits))
    assert dd.stats(model).per_layer == counts


def test_caches_that_have_no_place_for_layers_that_share_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As Transformers 5.0 makes them.
    model = make_gemma4("sdpa")
    expected = generate(model, make_prompt(PROMPT), STEPS)
    stock = DynamicCache.__init__

    def shorter(self: DynamicCache, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        self.layers = self.layers[:3]

    monkeypatch.setattr(DynamicCache, "__init__", shorter)
    dd.enable(model, small_config(dense_layers=(), delta_layers=(0, 3), budget_pages=64))
    got = generate(model, make_prompt(PROMPT), STEPS)
    torch.testing.assert_close(torch.cat(got.logits), torch.cat(expected.logits))
    assert dd.stats(model).steps == STEPS - 1


def test_a_decoder_of_an_encoder_decoder_family_has_its_own_depth() -> None:
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(
        vocab_size=61, d_model=32, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_layers=2,
        decoder_layers=6, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, init_std=0.4, **heads,
    )  # fmt: skip
    model = seeded(BartForCausalLM, config).double()
    expected = generate(model, make_prompt(PROMPT), STEPS, use_cache=False)
    dd.enable(model, small_config(budget_pages=64))
    got = generate(model, make_prompt(PROMPT), STEPS)
    torch.testing.assert_close(torch.cat(got.logits), torch.cat(expected.logits))
    dd.enable(model, small_config())
    small = generate(model, make_prompt(PROMPT), STEPS)
    assert [record.layer for record in dd.stats(model).per_layer] == list(range(6))
    static = generate(model, make_prompt(PROMPT), STEPS, cache_implementation="static")
    torch.testing.assert_close(torch.cat(static.logits), torch.cat(small.logits))
    assert dd.DeltaConfig.for_model(model).delta_layers[-1] > 1


def test_the_cache_that_a_checkpoint_of_gemma_asks_for() -> None:
    model = make_model("gemma3", "sdpa")
    expected = generate(model, make_prompt(PROMPT), STEPS)
    model.generation_config.cache_implementation = "hybrid"
    dd.enable(model, small_config("gemma3", budget_pages=64))
    got = generate(model, make_prompt(PROMPT), STEPS)
    assert isinstance(got.past_key_values, dd.DeltaCache)
    assert torch.equal(got.sequences, expected.sequences)


def test_an_attention_that_selects_for_itself_is_refused() -> None:
    kind = type(AutoConfig.for_model("minimax_m3_vl").get_text_config())
    config = kind(
        **{**COMMON, "num_local_experts": 2, "num_experts_per_tok": 1},
        layer_types=["full_attention", "full_attention"] + ["minimax_m3_sparse"] * 4,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    refused(model, "block_indices")


def test_the_tests_own_delta_agrees_past_the_budget_of_nested_models() -> None:
    whole = make_omni().double()
    model = whole.thinker
    dd.enable(whole, small_config())
    got = generate(model, make_prompt(PROMPT), STEPS)
    dd.disable(whole)
    model.set_attn_implementation({"text_config": NAME})
    rules = Rules(page=4, budget=5, recent=2, sink=1, sparse={2: 1, 4: 3, 5: 3})
    text = got.sequences[:, :-1]
    expected = slow_logits(model, text, range(PROMPT, text.shape[1]), rules)[PROMPT - 1 :]
    torch.testing.assert_close(torch.cat(got.logits), expected.float(), atol=1e-4, rtol=0)
