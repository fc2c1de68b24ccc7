"""Rows, logits and models made by hand for the tests of policies."""

import torch
from calibration_cases import SHAPE, VOCAB
from shared_kv_models import FAMILIES, shared_kv_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from deltadecode import DeltaConfig
from deltadecode.lab.policies import Layout
from deltadecode.lab.policies.base import Scores, View
from deltadecode.lab.policies.masked import LayerAttention

LAYOUT = Layout(layers=(0, 1, 2, 3, 4, 5), query_heads=4, kv_heads=2)


def view_of(lengths, slots, prompt=None, step=0):
    """Left-padded rows of some lengths."""
    lengths = torch.tensor(lengths)
    prompt = lengths if prompt is None else torch.tensor(prompt)
    return View(slots - lengths, prompt, slots, step, bool((lengths < slots).any()))


def look_at(view, logits=None, query=None, key=None):
    """Attention with given logits [B, Hkv, G, slots], or given queries and keys."""
    rows = view.start.shape[0]
    query = torch.zeros(rows, 1, 1) if query is None else query
    key = torch.zeros(rows, 1, view.slots, 1) if key is None else key
    attention = LayerAttention(query, key, Scores(1.0), view)
    if logits is not None:
        attention.__dict__["logits"] = logits  # in the place of the cached property
    return attention


def tokens(read, view, row=0, kv_head=0, head=0):
    """Token numbers that a mask lets through in a row."""
    shape = view.start.shape[0], read.shape[1], read.shape[2], view.slots
    mask = read.expand(shape)[row, kv_head, head] & view.exists[row]
    return view.position[row][mask].tolist()


def tiny_model(family="llama", **changes):
    """Six full-attention layers, attention far from uniform; five of eight in Gemma."""
    if family in FAMILIES:
        return shared_kv_model(family)
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    torch.manual_seed(0)
    return model(config(**{**SHAPE, "num_hidden_layers": 6, **changes})).eval()


def prompts(lengths, seed=0):
    """Left-padded token ids and mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(2, VOCAB, (length,), generator=generator)
        mask[row, width - length :] = 1
    return ids, mask


PLAN = DeltaConfig(
    page_size=4,
    budget_pages=5,
    recent_pages=2,
    sink_pages=1,
    dense_layers=(0,),
    delta_layers=(1,),
)
