"""Tiny random models whose last layers reuse the keys and values of earlier ones."""

from typing import Any

import torch
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
)

FAMILIES = ("gemma3n", "gemma4")
FULL_LAYERS = (0, 1, 3, 5, 7)  # the last two of them reuse what layer 3 stores
_KINDS = {"f": "full_attention", "s": "sliding_attention"}
COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "vocab_size_per_layer_input": 61,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_kv_shared_layers": 4,
    "layer_types": [_KINDS[kind] for kind in "ffsfsfsf"],
    "sliding_window": 12,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def shared_kv_model(family: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """A model in float32; Gemma 4's full layers have heads of their own size and number."""
    kind: Any
    if family == "gemma3n":
        config: Any = Gemma3nTextConfig(
            **COMMON, intermediate_size=[48] * 8, laurel_rank=4, altup_num_inputs=2,
            activation_sparsity_pattern=[0.0] * 8,
        )  # fmt: skip
        kind = Gemma3nForCausalLM
    else:
        config = Gemma4TextConfig(
            **COMMON, intermediate_size=48, global_head_dim=16, attention_k_eq_v=True,
            num_global_key_value_heads=1,
        )  # fmt: skip
        kind = Gemma4ForCausalLM
    config._attn_implementation = attention
    torch.manual_seed(seed)
    return kind(config).eval()
