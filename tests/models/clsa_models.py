"""Tiny CLSA models, of weights large enough that every part of them changes the logits."""

import torch

from deltadecode.models.clsa import ClsaConfig, ClsaForCausalLM

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 5,
    "index_topk": 6,
    "index_head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


def make_config(**changes):
    return ClsaConfig(**{**SHAPE, **changes})


def make_model(dtype=torch.float64, **changes):
    torch.manual_seed(1)
    return ClsaForCausalLM(make_config(**changes)).to(dtype).eval()


def step_by_step(model, ids, **kwargs):
    """Logits of every token, each given alone to the model's cache."""
    cache, out = None, []
    for t in range(ids.shape[1]):
        mask = kwargs.get("attention_mask")
        positions = kwargs.get("position_ids")
        given = model(
            ids[:, t : t + 1],
            past_key_values=cache,
            use_cache=True,
            attention_mask=None if mask is None else mask[:, : t + 1],
            position_ids=None if positions is None else positions[:, t : t + 1],
        )
        cache = given.past_key_values
        out.append(given.logits)
    return torch.cat(out, 1)
