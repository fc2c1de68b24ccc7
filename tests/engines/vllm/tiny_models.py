"""Shapes of tiny random models of the families that people serve, as Hugging Face configurations.

Each has three full-attention layers at least, so that one is dense, one a Δ-layer, and one sparse;
"windows" has none.
"""

SHAPE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.4, "tie_word_embeddings": False,
}  # fmt: skip
ALTERNATE = ["sliding_attention", "full_attention"]
# Two value heads for each key head, as in its checkpoints. With one, stock vLLM's kernel on a GPU
# gets numbers that do not lie side by side, and refuses them.
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 3, "num_hidden_layers": 6,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "initializer_range": 0.1,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
MODELS = {
    "llama": {"model_type": "llama", "num_hidden_layers": 4},
    # As Phi-3 and Phi-4 have it: a window on every layer, as long as the longest sequence.
    "phi": {"model_type": "phi3", "num_hidden_layers": 4, "sliding_window": 256},
    # Nothing to plan.
    "windows": {"model_type": "mistral", "num_hidden_layers": 4, "sliding_window": 16},
    # Layers 5 and 7 read the cache of layer 3; the even ones slide.
    "gemma3n": {
        "model_type": "gemma3n_text", "num_hidden_layers": 8, "num_kv_shared_layers": 4,
        "layer_types": ALTERNATE * 4, "sliding_window": 16,
        "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 16, "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 8, "initializer_range": 0.1,
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text", "num_hidden_layers": 6, "layer_types": ALTERNATE * 3,
        "sliding_window": 16, "query_pre_attn_scalar": 32, "initializer_range": 0.05,
        "tie_word_embeddings": True,
    },
    # Logits of attention are capped, near what most of them are.
    "gemma2": {
        "model_type": "gemma2", "num_hidden_layers": 6, "layer_types": ALTERNATE * 3,
        "sliding_window": 16, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0,
        "initializer_range": 0.2, "tie_word_embeddings": True,
    },
    # Full-attention layers have heads of another size than the others.
    "gemma4": {
        "model_type": "gemma4_text", "num_hidden_layers": 6, "layer_types": ALTERNATE * 3,
        "sliding_window": 16, "global_head_dim": 64, "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "enable_moe_block": False,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {
        "model_type": "gpt_oss", "num_hidden_layers": 6, "layer_types": ALTERNATE * 3,
        "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        "initializer_range": 0.2,
    },
    "qwen3_next": {"model_type": "qwen3_next", **LINEAR, **EXPERTS, "num_experts": 4,
        "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1,
    },
    "qwen3_5": {"model_type": "qwen3_5_text", **LINEAR},
    "llama4": {
        "model_type": "llama4_text", "num_hidden_layers": 6, "no_rope_layers": [1, 0] * 3,
        "attention_chunk_size": 32, "intermediate_size_mlp": 64, "num_local_experts": 4,
        "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
    },
    # Its checkpoints have a drafter of one layer (MTP), which tiny_drafters.py adds.
    "glm4_moe": {
        "model_type": "glm4_moe", "num_hidden_layers": 4, **EXPERTS, "n_routed_experts": 4,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "partial_rotary_factor": 0.5, "use_qk_norm": False, "attention_bias": False,
        "initializer_range": 0.1,
    },
}  # fmt: skip
MODELS["gemma4_wide"] = {**MODELS["gemma4"], "global_head_dim": 512}
