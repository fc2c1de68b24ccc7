"""What cannot work is refused in one line, before anything has run or changed."""

from typing import Any

import pytest
import torch
from hf_tiny import COMMON, generate, make_model, make_prompt, small_config
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import deltadecode as dd
from deltadecode import (
    DeltaCache,
    DeltaConfig,
    DeltaConfigError,
    UnsupportedCacheError,
    UnsupportedModelError,
)


def enabled() -> PreTrainedModel:
    model = make_model("llama", "sdpa")
    dd.enable(model, small_config())
    return model


class Never:
    """A streamer that nothing may reach."""

    def put(self, value: torch.Tensor) -> None:
        raise AssertionError("something ran")

    end = put


def refused(error: type[Exception], *parts: str, call: Any) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_cache_of_another_kind() -> None:
    model = enabled()
    config = model.config
    caches = {
        "StaticCache": StaticCache(config, max_cache_len=64),
        "DynamicCache": DynamicCache(config=config),
        "tuple": tuple((torch.zeros(1, 2, 3, 8),) * 2 for _ in range(6)),
    }
    for name, cache in caches.items():
        with torch.no_grad():
            refused(
                UnsupportedCacheError,
                f"got a {name}",
                "DeltaCache",
                call=lambda cache=cache: model(make_prompt(3), past_key_values=cache),
            )
        refused(
            UnsupportedCacheError,
            f"got a {name}",
            call=lambda cache=cache: generate(
                model, make_prompt(3), 4, past_key_values=cache, streamer=Never()
            ),
        )
    assert caches["DynamicCache"].get_seq_length() == 0
    assert dd.stats(model).steps == 0


def test_a_cache_of_another_model() -> None:
    other = DeltaCache(LlamaConfig(**{**COMMON, "num_hidden_layers": 4}))
    refused(
        UnsupportedCacheError,
        "6 layers",
        "4 layers",
        call=lambda: generate(enabled(), make_prompt(3), 4, past_key_values=other),
    )


@pytest.mark.parametrize("kind", ["offloaded_static", "sliding_window", "quantized", "paged"])
def test_another_cache_implementation(kind: str) -> None:
    model = enabled()
    refused(
        UnsupportedCacheError,
        repr(kind),
        "DeltaCache",
        call=lambda: generate(
            model, make_prompt(3), 4, cache_implementation=kind, streamer=Never()
        ),
    )
    if kind != "paged":  # an argument of generate only
        settings = GenerationConfig(cache_implementation=kind, max_new_tokens=4)
        refused(
            UnsupportedCacheError,
            repr(kind),
            call=lambda: model.generate(make_prompt(3), generation_config=settings),
        )
    assert dd.stats(model).steps == 0


def test_attention_weights() -> None:
    model = enabled()
    say = "output_attentions=True"
    options = {"output_attentions": True, "streamer": Never()}
    refused(ValueError, say, call=lambda: generate(model, make_prompt(3), 4, **options))
    settings = GenerationConfig(
        output_attentions=True, return_dict_in_generate=True, max_new_tokens=4
    )
    refused(ValueError, say, call=lambda: model.generate(make_prompt(3), settings))
    cache = DeltaCache(model.config)
    refused(
        ValueError,
        say,
        call=lambda: model(make_prompt(3), past_key_values=cache, output_attentions=True),
    )
    assert cache.get_seq_length() == 0
    model.generation_config.output_attentions = True
    refused(ValueError, say, call=lambda: model.generate(make_prompt(3), max_new_tokens=4))
    eager = make_model("llama", "eager")
    eager.config.output_attentions = True
    refused(ValueError, say, call=lambda: dd.enable(eager, small_config()))
    assert eager.config._attn_implementation == "eager"


def test_assisted_decoding() -> None:
    model = enabled()
    for options in (
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": make_model("llama", "sdpa")},
        {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3, max_new_tokens=4)},
    ):
        refused(
            ValueError,
            "assisted decoding",
            call=lambda options=options: model.generate(
                make_prompt(3), max_new_tokens=4, streamer=Never(), **options
            ),
        )


def test_a_prompt_longer_than_the_positions_names_both_numbers() -> None:
    model = enabled()
    say = ("256 positions", "257 tokens")
    refused(ValueError, *say, call=lambda: generate(model, make_prompt(257), 1, streamer=Never()))
    refused(ValueError, *say, call=lambda: model.generate(input_ids=make_prompt(257)))
    cache = DeltaCache(model.config)
    with torch.no_grad():
        refused(ValueError, *say, call=lambda: model(make_prompt(257), past_key_values=cache))
        assert cache.get_seq_length() == 0
        model(make_prompt(200), past_key_values=cache)
        refused(ValueError, *say, call=lambda: model(make_prompt(57), past_key_values=cache))
        assert cache.get_seq_length() == 200


def test_padding_is_no_part_of_the_prompt_and_stretched_positions_count() -> None:
    model = enabled()
    mask = torch.ones(1, 260, dtype=torch.long)
    mask[:, :4] = 0
    generate(model, make_prompt(260), 1, attention_mask=mask)
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}
    rope["original_max_position_embeddings"] = 256
    stretched = make_model("llama", "sdpa", rope_parameters=rope)
    dd.enable(stretched, small_config())
    generate(stretched, make_prompt(512), 1)
    refused(
        ValueError,
        "512 positions",
        "513 tokens",
        call=lambda: generate(stretched, make_prompt(513), 1),
    )


TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def mla() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        DeepseekV3Config(
            **TINY,
            num_key_value_heads=2,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            n_routed_experts=2,
            num_experts_per_tok=1,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=8,
        )
    )


def encoder_decoder() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    )


def sliding_only() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        MistralConfig(**TINY, num_key_value_heads=1, sliding_window=8)
    )


def own_attention() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=3, n_head=2))


def encoder() -> PreTrainedModel:
    return BertModel(BertConfig(**TINY))


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (mla, "latent attention"),
        (encoder_decoder, "encoder-decoder"),
        (sliding_only, "no full-attention layer"),
        (own_attention, "attention interface"),
        (encoder, "none of its attention layers is causal"),
    ],
)
def test_a_model_that_cannot_be_planned_is_named(make: Any, rule: str) -> None:
    model = make()
    name, before = type(model).__name__, model.config._attn_implementation
    for cfg in (None, DeltaConfig(dense_layers=(), delta_layers=(0,))):
        refused(UnsupportedModelError, name, rule, call=lambda cfg=cfg: dd.enable(model, cfg))
    assert model.config._attn_implementation == before
    assert not model._forward_pre_hooks
    # Loaded with the name: at the first use.
    model = type(model)._from_config(model.config, attn_implementation="delta")
    tokens = {"input_ids": make_prompt(3) % 50}
    refused(UnsupportedModelError, name, rule, call=lambda: model(**tokens))
    if model.can_generate():
        refused(UnsupportedModelError, name, rule, call=lambda: model.generate(**tokens))


def test_a_plan_for_another_depth_leaves_the_model_alone() -> None:
    model = make_model("llama", "sdpa")
    for cfg, parts in (
        (DeltaConfig(), ("delta_layers", "0..5", "14")),
        (small_config(dense_layers=(), delta_layers=(1,)), ("sparse layer 0",)),
    ):
        refused(DeltaConfigError, *parts, call=lambda cfg=cfg: dd.enable(model, cfg))
        assert model.config._attn_implementation == "sdpa"
        assert not model._forward_pre_hooks
        assert "generate" not in vars(model)
    gemma = make_model("gemma3", "sdpa")
    cfg = small_config(dense_layers=(), delta_layers=(1, 3))
    refused(DeltaConfigError, "full-attention", "3", call=lambda: dd.enable(gemma, cfg))


def test_a_failed_change_of_plan_keeps_the_old_one() -> None:
    model = enabled()
    expected = generate(model, make_prompt(23), 12)
    counts = dd.stats(model)
    refused(DeltaConfigError, "14", call=lambda: dd.enable(model, DeltaConfig()))
    assert dd.stats(model) is counts
    got = generate(model, make_prompt(23), 12)
    assert torch.equal(torch.cat(got.logits), torch.cat(expected.logits))


def test_what_is_no_model_and_no_configuration() -> None:
    refused(TypeError, "Linear", call=lambda: dd.enable(torch.nn.Linear(2, 2)))
    refused(
        TypeError, "dict", call=lambda: dd.enable(make_model("llama", "sdpa"), {"page_size": 4})
    )


def test_masks_that_are_no_masks() -> None:
    model = enabled()
    with torch.no_grad():
        cache = model(make_prompt(30)).past_key_values

    def step(mask: torch.Tensor) -> Any:
        with torch.no_grad():
            return model(make_prompt(1), attention_mask=mask, past_key_values=cache)

    bias = torch.zeros(1, 1, 1, 31)
    bias[..., 4] = -1.5
    refused(ValueError, "-1.5", "position biases", call=lambda: step(bias))
    cache.crop(-1)
    heads = torch.ones(1, 4, 1, 31, dtype=torch.bool)
    heads[:, 2, :, 4] = False
    refused(ValueError, "4 heads", call=lambda: step(heads))
    cache.crop(-1)
    refused(ValueError, "31", "30", call=lambda: step(torch.ones(1, 1, 1, 30, dtype=torch.bool)))


def test_an_attention_that_takes_more_than_delta_knows() -> None:
    model = enabled()
    attention = model.model.layers[1].self_attn
    stock = attention.forward

    def with_bias(*args: Any, **kwargs: Any) -> Any:
        return stock(*args, **kwargs, position_bias=torch.zeros(1, 4, 3, 3))

    attention.forward = with_bias
    with torch.no_grad():
        refused(
            UnsupportedModelError,
            "LlamaAttention",
            "position_bias",
            call=lambda: model(make_prompt(3)),
        )


def test_a_sparse_layer_whose_delta_layer_did_not_run() -> None:
    model = enabled()
    with torch.no_grad():
        cache = model(make_prompt(30)).past_key_values
        del model.model.layers[1:2]
        refused(
            RuntimeError,
            "layer 2",
            "Δ-layer 1",
            call=lambda: model(make_prompt(1), past_key_values=cache),
        )
