"""Tiny random models of the real classes, with attention far from uniform."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from deltadecode import DeltaConfig

VOCAB = 61
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    # Large, so that some tokens get most of the weight and a wrong selection shows.
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
SLIDING = ["sliding_attention", "full_attention", "full_attention"] * 2
EXPERTS = {"num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "phi3": (Phi3Config, {"original_max_position_embeddings": 256}),
    "gemma2": (
        Gemma2Config,
        {
            "layer_types": SLIDING,
            "sliding_window": 12,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        {"layer_types": SLIDING, "sliding_window": 12, "query_pre_attn_scalar": 8},
    ),
    "gpt_oss": (
        GptOssConfig,
        {
            "layer_types": SLIDING,
            "sliding_window": 12,
            "num_local_experts": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            **EXPERTS,
        },
    ),
    "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 16, **EXPERTS}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "sliding_window": None, **EXPERTS}),
}
HYBRID = ("gemma2", "gemma3", "gpt_oss")
# Those whose stock attention is eager, as sdpa knows neither sinks nor soft-caps.
EAGER = ("gemma2", "gpt_oss")


def stock_name(family: str) -> str:
    """The attention implementation that Transformers gives the family."""
    return "eager" if family in EAGER else "sdpa"


def make_model(family: str, attention: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of the family; equal weights for equal seeds, whatever the attention."""
    kind, values = FAMILIES[family]
    config = kind(**{**COMMON, **values, **changes})
    torch.manual_seed(seed)
    # The grouped experts know no float64.
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases and sinks start at zero, where a mistake in them would not show.
            if name.endswith(("bias", "sinks")):
                parameter.normal_(std=0.5)
    return model.eval()


def make_prompt(tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, tokens], none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (rows, tokens), generator=generator)


def small_config(family: str = "llama", **changes: Any) -> DeltaConfig:
    """P = 4, K = 5, L = 2, S = 1, with two Δ-layers and a sparse layer behind each."""
    dense, delta = ((), (1, 4)) if family in HYBRID else ((0,), (1, 3))
    values: dict[str, Any] = {
        "page_size": 4,
        "budget_pages": 5,
        "recent_pages": 2,
        "sink_pages": 1,
        "dense_layers": dense,
        "delta_layers": delta,
    }
    return DeltaConfig(**{**values, **changes})


def sources(family: str = "llama") -> dict[int, int]:
    """Sparse layer -> its Δ-layer, as ``small_config`` plans them."""
    return {2: 1, 5: 4} if family in HYBRID else {2: 1, 4: 3, 5: 3}


GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def generate(model: PreTrainedModel, prompt: torch.Tensor, steps: int, **options: Any) -> Any:
    """Greedy generation that returns tokens, logits and the cache."""
    return model.generate(prompt, max_new_tokens=steps, **{**GREEDY, **options})
