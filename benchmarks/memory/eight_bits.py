"""What caches of eight bits lose as they are, beside one that holds bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import deltadecode as dd
from benchmarks.memory.rounding import ROUNDINGS, RoundedCache, loss_rows
from deltadecode.config import KV_DTYPES


@torch.inference_mode()
def eight_bit_losses(
    model: Any,
    tokenizer: Any,
    plans: Sequence[dd.DeltaConfig],
    contexts: Sequence[int],
    **asked: Any,
) -> list[dict[str, Any]]:
    """A row for each context and type, as :func:`benchmarks.memory.rounding.loss_rows` has them."""
    kinds = {kv_dtype: {"kv_dtype": kv_dtype} for kv_dtype in KV_DTYPES}
    return loss_rows(model, tokenizer, plans, contexts, kinds, _text_losses, **asked)


def _text_losses(model: Any, plan: dd.DeltaConfig, ids: Tensor, context: int, steps: int) -> Tensor:
    """Mean KL over the steps: of a bfloat16 cache, and of each type of eight bits."""
    dd.disable(model)
    full = DynamicCache(config=model.config)
    model(ids[:, :context], past_key_values=full, logits_to_keep=1)
    caches: list[dd.DeltaCache] = [
        RoundedCache(model.config, full, ROUNDINGS[:1], plan.page_size),
        *(dd.DeltaCache(model.config, kv_dtype=kv_dtype) for kv_dtype in KV_DTYPES),
    ]
    prompt: list[Any] = full.layers
    for number, layer in enumerate(prompt):
        for cache in caches[1:]:
            cache.update(layer.keys, layer.values, number)
    total = torch.zeros(len(caches))
    for step in range(context, context + steps):
        token = ids[:, step : step + 1]
        dd.disable(model)
        stock = model(token, past_key_values=full).logits[0, -1].float().log_softmax(-1)
        dd.enable(model, plan)
        for place, cache in enumerate(caches):
            ours = model(token, past_key_values=cache).logits[0, -1].float().log_softmax(-1)
            total[place] += (stock.exp() * (stock - ours)).sum()
    return total / steps
