"""Tiny random models whose attention is not the textbook's, and the maps that they return."""

from __future__ import annotations

from typing import Any

import torch
from calibration_cases import SHAPE
from shared_kv_models import FAMILIES, shared_kv_model
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, Qwen3NextConfig

from deltadecode.lab.tasks import model_path

COMMON: dict[str, Any] = {
    **SHAPE,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}


def make(name: str) -> Any:
    """A model in float32, whose stock attention is eager."""
    if name in FAMILIES:
        return shared_kv_model(name, "eager")
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    if name == "embedded":
        return AutoModelForCausalLM.from_pretrained(model_path(), **options).eval()
    if name == "llama":
        config: Any = LlamaConfig(**COMMON)
    elif name == "gated":
        config = Qwen3NextConfig(
            **{**COMMON, "head_dim": 16}, **ROPE, partial_rotary_factor=0.5,
            layer_types=["linear_attention", "full_attention"] * 2, linear_num_key_heads=2,
            linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )  # fmt: skip
    else:
        kinds = {
            "learned": ["sliding_attention", "full_attention"],
            "off-by-one": ["full_attention"],
        }
        config = GptOssConfig(
            **COMMON, **ROPE, **EXPERTS, sliding_window=12,
            layer_types=kinds[name] * (4 // len(kinds[name])),
        )  # fmt: skip
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager", **options)
    with torch.no_grad():
        for parameter, values in model.named_parameters():
            if parameter.endswith("bias"):
                values.normal_(std=0.5)
            # Off-by-one softmax: 1 more in the denominator is a learned sink with logit 0.
            if parameter.endswith("sinks"):
                values.normal_(std=2.0) if name == "learned" else values.zero_()
    return model.eval()


NAMES = ("embedded", "llama", "learned", "off-by-one", "gated", *FAMILIES)


def prompt(model: Any, tokens: int) -> torch.Tensor:
    """Token ids [1, tokens]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, model.config.vocab_size, (1, tokens), generator=generator)


def eager_maps(model: Any, ids: torch.Tensor) -> Any:
    """Output of stock eager attention, with the maps and hidden states of all layers."""
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return model(ids, output_attentions=True, output_hidden_states=True)


def full_layers(model: Any) -> list[int]:
    """Numbers of the full-attention layers, read off the configuration by hand."""
    kinds = getattr(model.config, "layer_types", None)
    depth = model.config.num_hidden_layers
    return [i for i in range(depth) if kinds is None or kinds[i] == "full_attention"]
