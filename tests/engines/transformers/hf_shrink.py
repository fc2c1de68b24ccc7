"""Any configuration of Transformers made tiny: a few small layers of every kind that it has."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

VOCAB = 61
LAYERS = 6
_LAYER_NAMES = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"),
    *("decoder_layers", "encoder_layers", "num_encoder_layers", "depth", "num_blocks"),
)
SMALL: dict[str, Any] = {
    **dict.fromkeys(_LAYER_NAMES, LAYERS),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "emb_dim", "dim_model"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "attention_hidden_size"), 32),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "hidden_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dff", "d_inner", "dim_ff"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(
        ("expert_ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size"), 48
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_query_groups"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "attention_head_size", "kv_channels"), 8),
    **dict.fromkeys(("dim_head", "d_head", "global_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "text_vocab_size"), VOCAB),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("top_k_experts", "zero_expert_num"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(
        ("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 16
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("max_target_positions", "context_length", "model_max_length"), 256),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size"), 12),
    **dict.fromkeys(("attention_chunk_size", "sliding_window_size", "local_attention"), 12),
    **dict.fromkeys(("initializer_range", "init_std", "embed_init_std", "emb_init_std"), 0.4),
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "o_lora_rank", "hidden_size_per_layer_input"), 16
    ),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_head_dim"), 8),
    "qk_head_dim": 16,
    **dict.fromkeys(("index_head_dim", "indexer_head_dim"), 16),
    **dict.fromkeys(("index_n_heads", "indexer_n_heads"), 2),
    **dict.fromkeys(("index_topk", "indexer_budget"), 8),
    **dict.fromkeys(
        ("attention_dropout", "hidden_dropout_prob", "dropout", "activation_dropout"), 0.0
    ),
    **dict.fromkeys(
        ("attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0
    ),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "time_step_rank"), 8),
    **dict.fromkeys(("mamba_dt_rank",), 8),
    "query_pre_attn_scalar": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "is_decoder": True,
    "vocab_size_per_layer_input": VOCAB,
}
# What one type needs besides, or else. A dict under the name of a part changes that part.
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MIXED = ["linear_attention", "full_attention", "full_attention"] * 2
_SLIDING = ["sliding_attention", "full_attention", "full_attention"] * 2
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_ASSISTANT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": LAYERS,
}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}
_HALF_MROPE = {"rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 1.0}}
FAMILY: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "paddleocr_vl_text"), _MROPE),
    **dict.fromkeys(("glm4v_text", "glm4v_moe_text", "glm_ocr_text", "glmga_text"), _HALF_MROPE),
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 2, 4, 5]},
    "blt": {"encoder_hash_byte_group_vocab": 61, "encoder_hash_byte_group_size": [3]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": _SLIDING,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_audio_encoder": {
        **{"per_layer_config": {}, "adapter_input_size": 32, "adapter_out_dim": 32}
    },
    "dots3_note_vision_encoder": {
        **{"per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 32}
    },
    "dots3_note_text": {
        **{"head_dim": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
        **{"swa_q_lora_rank": 16, "swa_kv_lora_rank": 16},
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4},
    },
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_assistant": {"text_config": _ASSISTANT},
    "gemma4_unified_assistant": {"text_config": _ASSISTANT},
    "gemma4_text": {"num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA, "layer_types": _MIXED},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "mimo_v2_flash": {"v_head_dim": 4},
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"] * 3},
    "ministral": {"layer_types": _SLIDING},
    "musicgen_decoder": {"num_codebooks": 1, "initializer_factor": 0.4},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron_h": {
        "layer_types": ["linear_attention", "full_attention", "moe", *["full_attention"] * 3]
    },
    "qwen4_exp_text": {"indexer_kv_heads": 1, "indexer_compress_ratio": 2},
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [16, 16]},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layer_types": ["linear_attention", "hybrid", "hybrid"] * 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """The configuration class ``kind`` with small numbers wherever it has such a number."""
    try:
        default: Any = kind()
        names = set(vars(default))
    except Exception:  # some defaults break the class's own rules
        default, names = None, set(inspect.signature(kind).parameters)
    changes = {**FAMILY.get(kind.model_type, {}), **changes}
    values = {name: small for name, small in SMALL.items() if name in names}
    if "kv_lora_rank" in names and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    types = getattr(default, "layer_types", None) or ()
    if not types and "sliding_window" in values:
        # A window as long as the positions hides nothing: full attention, as in Phi-3.
        slides = getattr(default, "sliding_window", None) is not None
        values["sliding_window"] = values.get("max_position_embeddings", 256) if slides else None
    for name, declared in getattr(kind, "sub_configs", {}).items():
        part = type(getattr(default, name, None))
        if not issubclass(part, PreTrainedConfig):
            spec = getattr(kind, "sub_configs_defaults", {}).get(name)
            part = CONFIG_MAPPING[spec.model_type] if spec is not None else declared
        if getattr(part, "model_type", "") and not isinstance(changes.get(name), PreTrainedConfig):
            values[name] = tiny_config(part, **changes.pop(name, {}))
    values.update(changes)
    other = next((name for name in types if name != "full_attention"), None)
    if "full_attention" in types and other is not None and "layer_types" not in values:
        with contextlib.suppress(Exception):
            return kind(**values, layer_types=[other, "full_attention", "full_attention"] * 2)
    return kind(**values)


def tiny_model(model_type: str, attention: str | None = None, seed: int = 0) -> PreTrainedModel:
    """The model that generates text of a type, in float64; equal weights for equal seeds."""
    config = tiny_config(CONFIG_MAPPING[model_type])
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind = mapping[type(config)]
    if not isinstance(config, kind.config_class):  # the class takes a part of it
        config = tiny_config(kind.config_class)
    torch.manual_seed(seed)
    # The grouped experts know no float64.
    model = kind._from_config(config, attn_implementation=attention, experts_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases and sinks start at zero, where a mistake in them would not show.
            if name.endswith(("bias", "sinks")):
                parameter.normal_(std=0.5)
    # Some families read these there alone.
    model.generation_config.update(
        pad_token_id=0,
        bos_token_id=1,
        decoder_start_token_id=1,
        num_beams=1,
        num_return_sequences=1,
        forced_eos_token_id=None,
    )
    return model.double().eval()
