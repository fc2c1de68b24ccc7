"""A tiny model whose attention is far from uniform, and texts for it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltadecode.lab.tasks.tokenizer import build_tokenizer

VOCAB = 61
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def tiny_model(layers=5, **changes):
    torch.manual_seed(0)
    values = {**SHAPE, "num_hidden_layers": layers, **changes}
    return LlamaForCausalLM(LlamaConfig(**values)).eval()


def save_tiny_checkpoint(folder, **changes):
    """A random model of the chain tasks' vocabulary, and its tokenizer; returns the folder."""
    tokenizer = build_tokenizer(512)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=6,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        pad_token_id=0, **changes,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def token_ids(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (length,), generator=generator).tolist()
