"""A tiny model whose attention is far from uniform, and texts for it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 61


def tiny_model(layers=5, **changes):
    torch.manual_seed(0)
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**values)).eval()


def token_ids(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (length,), generator=generator).tolist()
