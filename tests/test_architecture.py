"""Reading a model's attention from its configuration (R8), on stand-ins and on real classes."""

from types import SimpleNamespace

import pytest
import transformers

from deltadecode.architecture import attention_layers, signature, text_config
from deltadecode.errors import UnsupportedModelError


def config(**values):
    return SimpleNamespace(**{"num_hidden_layers": 4, "num_attention_heads": 4, **values})


def test_all_layers_without_a_word_about_windows():
    assert attention_layers(config()) == (0, 1, 2, 3)


def test_layer_types_decide():
    types = ["sliding_attention", "full_attention", "linear_attention", "full_attention"]
    assert attention_layers(config(layer_types=types, sliding_window=2)) == (1, 3)
    assert attention_layers(config(layer_types=["mamba", "attention"])) == (1,)


@pytest.mark.parametrize(
    ("window", "more", "full"),
    [
        (None, {}, True),
        (4096, {}, False),
        (4096, {"max_position_embeddings": 4097}, False),
        (4096, {"max_position_embeddings": 4096}, True),
        (4096, {"max_position_embeddings": 131072, "use_sliding_window": False}, True),
    ],
)
def test_a_window_counts_if_it_hides_something(window, more, full):
    stand_in = config(sliding_window=window, **more)
    if full:
        assert attention_layers(stand_in) == (0, 1, 2, 3)
    else:
        with pytest.raises(UnsupportedModelError, match="SimpleNamespace has no full-attention"):
            attention_layers(stand_in)


def test_text_part_of_a_composite_config():
    text = config(num_hidden_layers=7)
    outer = SimpleNamespace(get_text_config=lambda decoder: text if decoder else None)
    assert text_config(outer) is text
    assert attention_layers(SimpleNamespace(config=outer)) == tuple(range(7))


def test_signature():
    stand_in = config(model_type="llama", hidden_size=64)
    assert signature(stand_in) == {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    assert signature(config(num_key_value_heads=2))["num_key_value_heads"] == 2


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("LlamaConfig", {"num_hidden_layers": 3}, (0, 1, 2)),
        ("GPT2Config", {"n_layer": 2}, (0, 1)),
        ("Qwen2Config", {"num_hidden_layers": 3}, (0, 1, 2)),
        (
            "Qwen2Config",
            {
                "num_hidden_layers": 4,
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 2,
            },
            (0, 1),
        ),
        ("MistralConfig", {"num_hidden_layers": 2, "sliding_window": None}, (0, 1)),
        ("Gemma3TextConfig", {"num_hidden_layers": 12}, (5, 11)),
        ("Gemma3Config", {"text_config": {"num_hidden_layers": 6}}, (5,)),
        ("GptOssConfig", {"num_hidden_layers": 4}, (1, 3)),
        ("MixtralConfig", {"num_hidden_layers": 2}, (0, 1)),
        ("JambaConfig", {"num_hidden_layers": 16}, (4, 12)),
    ],
)
def test_real_configs(name, values, expected):
    real = getattr(transformers, name)(**values)
    assert attention_layers(real) == expected


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("T5Config", {}, "encoder-decoder"),
        ("BartConfig", {}, "encoder-decoder"),
        ("DeepseekV3Config", {}, "latent attention.*kv_lora_rank 512"),
        ("MistralConfig", {"sliding_window": 4096}, "no full-attention layer"),
        ("MambaConfig", {}, "no full-attention layer"),
    ],
)
def test_real_configs_that_cannot_be_planned(name, values, reason):
    real = getattr(transformers, name)(**values)
    with pytest.raises(UnsupportedModelError, match=f"{name}.*{reason}") as error:
        attention_layers(real)
    assert "\n" not in str(error.value)
