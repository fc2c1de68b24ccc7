"""What is read from the source of attention layers, and what is refused for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from deltadecode.engines.transformers.interface import attention_modules, check_interface
from deltadecode.engines.transformers.layer_source import interface_use
from deltadecode.errors import UnsupportedModelError


class Attention(nn.Module):
    """The least that is an attention layer; subclasses change its ``forward``."""

    def __init__(self, config: Any = None, layer_idx: int = 0) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager_attention_forward)
        return attention_interface(self, x, x, x, attention_mask, scaling=1.0, **kwargs)


class OneOfTwo(Attention):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        if x.shape[0] == 1:
            return attend(self, x, x, x, attention_mask)
        if attention_mask is None:
            out = attend(self, x, x, x, None)
        else:
            out = attend(self, x, x, x, attention_mask[:, :, :, : x.shape[2]])
        return out


class Twice(Attention):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return self.half(x, attention_mask) - self.half(-x, attention_mask)

    def half(self, x: Tensor, attention_mask: Tensor | None) -> Any:
        attention_interface = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attention_interface(self, x, x, x, attention_mask)[0]


class InALoop(Attention):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        attention_interface = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return [attention_interface(self, part, part, part, None) for part in x.split(1)]


class OtherSinks(Attention):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        attention_interface = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attention_interface(self, x, x, x, attention_mask, sinks=x[0], **kwargs)


class OwnMask(Attention):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        attention_interface = ALL_ATTENTION_FUNCTIONS["sdpa"]
        if attention_mask is not None:
            attention_mask = attention_mask + x.sum()
        return attention_interface(self, x, x, x, attention_mask, **kwargs)


class Indexed(Attention):
    """Selects by an indexer, if it has one."""

    def __init__(self, config: Any = None, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        self.indexer: nn.Module | None = None

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        attention_interface = ALL_ATTENTION_FUNCTIONS["sdpa"]
        indices = None
        if self.indexer is not None:
            indices = self.indexer(x)
            attention_mask = attention_mask * indices
        return attention_interface(self, x, x, x, attention_mask, indices=indices, **kwargs)


class Cross(Attention):
    def __init__(self, config: Any = None, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        del self.is_causal

    def forward(self, x: Tensor, cross_attention_states: Tensor | None = None) -> Any:
        attention_interface = ALL_ATTENTION_FUNCTIONS["sdpa"]
        y = x if cross_attention_states is None else cross_attention_states
        return attention_interface(self, x, y, y, None)


class NeverCausal(Attention):
    def forward(self, x: Tensor) -> Any:
        attention_interface = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attention_interface(self, x, x, x, None, is_causal=False)


class NoInterface(Attention):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        return nn.functional.scaled_dot_product_attention(x, x, x, attention_mask)


def model_with(kind: type[nn.Module], layer: int = 1) -> LlamaForCausalLM:
    """A Llama of four layers, one of which attends by another class."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config)
    model.model.layers[layer].self_attn = kind(model.config, layer)
    return model


@pytest.mark.parametrize(
    ("kind", "calls"),
    [
        (LlamaAttention, 1),
        (Attention, 1),
        (OneOfTwo, 1),
        (Twice, 2),
        (InALoop, 2),
        (NoInterface, 0),
    ],
)
def test_calls_are_counted_on_the_way_with_the_most(kind: type[nn.Module], calls: int) -> None:
    use = interface_use(kind)
    assert use is not None
    assert use.calls == calls
    assert not use.own_mask


@pytest.mark.parametrize(
    ("family", "kind", "fact", "value"),
    [
        ("diffllama", "DiffLlamaAttention", "calls", 2),
        ("doge", "DogeAttention", "own_mask", True),
        ("minimax_m3_vl", "MiniMaxM3VLAttention", "asks_name", True),
        ("glm5_next", "Glm5NextTextAttention", "own_mask", True),
        ("qwen4_exp", "Qwen4ExpTextAttention", "own_mask", True),
        ("mllama", "MllamaTextCrossAttention", "crosses", "cross_attention_states"),
        ("bart", "BartAttention", "crosses", "key_value_states"),
        ("zaya", "ZayaAttention", "own_mask", False),
        ("gpt2", "GPT2Attention", "own_mask", False),
        ("qwen2_vl", "VisionAttention", "calls", 2),
    ],
)
def test_real_classes_are_read_as_they_are(family: str, kind: str, fact: str, value: Any) -> None:
    name = f"transformers.models.{family}.modeling_{family}"
    module = pytest.importorskip(name, reason=f"this Transformers has no {family}")
    assert getattr(interface_use(getattr(module, kind)), fact) == value


def test_sinks_and_selections_of_real_classes_are_seen() -> None:
    for family, kind, keyword in (
        ("inkling2", "Inkling2FullAttention", "sinks"),
        ("deepseek_v32", "DeepseekV32Attention", "indices"),
        ("minimax_m3_vl", "MiniMaxM3VLAttention", "block_indices"),
        ("gpt_oss", "GptOssAttention", "s_aux"),
        ("gemma2", "Gemma2Attention", "softcap"),
    ):
        name = f"transformers.models.{family}.modeling_{family}"
        module = pytest.importorskip(name, reason=f"this Transformers has no {family}")
        use = interface_use(getattr(module, kind))
        assert use is not None and keyword in use.keywords


def test_every_layer_of_a_plain_model_gives_its_module() -> None:
    model = model_with(OneOfTwo)
    found = check_interface(model, range(4))
    assert found == {i: layer.self_attn for i, layer in enumerate(model.model.layers)}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Twice, r"model.layers.1.self_attn \(Twice\) calls its attention function more than once"),
        (InALoop, "more than once"),
        (OtherSinks, "passes sinks to its attention function, which DELTA does not know"),
        (OwnMask, "a mask of its own"),
        (Cross, "layer 1 has no causal self-attention"),
        (NeverCausal, "layer 1 has no causal self-attention"),
        (NoInterface, "layer 1 has no causal self-attention on the attention interface"),
    ],
)
def test_a_planned_layer_that_asks_for_more_is_refused(kind: type[nn.Module], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        check_interface(model_with(kind), range(4))
    assert str(error.value).startswith("LlamaForCausalLM cannot decode with DELTA: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [Twice, OwnMask, Cross, NeverCausal, NoInterface])
def test_a_layer_outside_the_plan_may_do_what_sdpa_can(kind: type[nn.Module]) -> None:
    assert set(check_interface(model_with(kind), [0, 2, 3])) == {0, 2, 3}


def test_sinks_under_another_name_are_refused_in_any_layer() -> None:
    with pytest.raises(UnsupportedModelError, match="passes sinks"):
        check_interface(model_with(OtherSinks), [0, 2, 3])


def test_what_a_layer_does_with_a_part_that_it_has_not_does_not_count() -> None:
    model = model_with(Indexed)
    check_interface(model, range(4))
    model.model.layers[1].self_attn.indexer = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="passes indices"):
        check_interface(model, range(4))


def test_two_head_sizes_and_latent_attention_are_refused_from_what_the_module_says() -> None:
    model = model_with(LlamaAttention)
    model.model.layers[2].self_attn.v_head_dim = 3
    with pytest.raises(UnsupportedModelError, match="keys of size 4 and values of size 3"):
        check_interface(model, range(4))
    del model.model.layers[2].self_attn.v_head_dim
    model.model.layers[2].self_attn.kv_lora_rank = 4
    with pytest.raises(UnsupportedModelError, match=r"latent attention \(kv_lora_rank 4\)"):
        check_interface(model, range(4))
    assert set(check_interface(model, [0, 1, 3])) == {0, 1, 3}


def test_two_self_attentions_in_one_layer_are_refused() -> None:
    model = model_with(LlamaAttention)
    model.model.layers[2].second = Attention(model.config, 2)
    with pytest.raises(UnsupportedModelError, match="layer 2 has 2 causal self-attention"):
        check_interface(model, range(4))


def test_attention_of_another_decoder_in_the_model_is_not_looked_at() -> None:
    model = model_with(LlamaAttention)
    model.talker = Twice(LlamaConfig(), 1)
    check_interface(model, range(4))
    assert [path for path, _ in attention_modules(model)[1]] == ["model.layers.1.self_attn"]


def test_source_that_cannot_be_read_leaves_is_causal_to_decide() -> None:
    made: dict[str, Any] = {"Attention": Attention}
    exec("class Unread(Attention):\n    def forward(self, x):\n        return x", made)
    assert interface_use(made["Unread"]) is None
    model = model_with(made["Unread"])
    assert set(check_interface(model, range(4))) == {0, 1, 2, 3}
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match="layer 1 has no causal self-attention"):
        check_interface(model, range(4))


def test_a_cache_class_of_the_models_own_is_refused() -> None:
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    config = MiniMaxConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    with torch.device("meta"):
        model = MiniMaxForCausalLM(config)
    with pytest.raises(
        UnsupportedModelError, match="MiniMaxModel decodes from a MiniMaxCache only"
    ):
        check_interface(model, [1, 3])
