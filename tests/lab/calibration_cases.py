"""A tiny model whose attention is far from uniform, and what its eager attention maps say."""

from itertools import pairwise

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 61


class Tokenizer:
    """As much of a tokenizer as generation asks for."""

    pad_token_id = 0

    def __init__(self, eos=None):
        self.eos_token_id = eos


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


def eager_steps(model, ids, new_tokens, ends=()):
    """Attention [layers, Hq, n] of each decode step of one text, from stock eager attention."""
    stock = model.config._attn_implementation
    model.set_attn_implementation("eager")
    text, steps = list(ids), []
    with torch.no_grad():
        for _ in range(new_tokens):
            out = model(torch.tensor([text]), output_attentions=True)
            # The last query is the decode step of the newest token; that of the prompt is none.
            if len(text) > len(ids):
                steps.append(torch.stack([a[0, :, -1] for a in out.attentions]).double().numpy())
            text.append(int(out.logits[0, -1].argmax()))
            if text[-1] in ends:
                break
    model.set_attn_implementation(stock)
    return steps


def pages_of(values, size):
    """Sums by page of the last dimension, with a loop."""
    n = values.shape[-1]
    return np.stack([values[..., i : i + size].sum(-1) for i in range(0, n, size)], axis=-1)


def select(scores, count, recent, sink):
    """Pages of a layer by sorting: forced ones first, then by score, lower page first."""
    pages = range(len(scores))
    forced = [p for p in pages if p < sink or p >= len(scores) - recent]
    rest = sorted((p for p in pages if p not in forced), key=lambda p: (-scores[p], p))
    return sorted(forced + rest[: count - len(forced)])


def captured(steps, size, count, recent, sink, stride):
    """R of one text with loops; None when no step has more pages than the budget."""
    found = []
    for attention in steps[::stride]:
        scores = pages_of(attention.max(axis=1), size)
        mass = pages_of(attention.mean(axis=1), size)
        if scores.shape[1] <= count:
            continue
        chosen = [select(row, count, recent, sink) for row in scores]
        found.append([[mass[j][pages].sum() for j in range(len(mass))] for pages in chosen])
    return (np.mean(found, axis=0), len(found)) if found else None


def shift(steps, stride):
    """1 - cos between the mean-over-heads rows of adjacent layers."""
    curves = []
    for attention in steps[::stride]:
        rows = attention.mean(axis=1)
        curve = [0.0]
        for before, now in pairwise(rows):
            curve.append(1 - before @ now / np.linalg.norm(before) / np.linalg.norm(now))
        curves.append(curve)
    return np.mean(curves, axis=0)
