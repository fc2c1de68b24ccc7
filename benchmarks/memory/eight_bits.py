"""What caches of eight bits lose as they are, beside one that holds bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import deltadecode as dd
from benchmarks.memory.rounding import ROUNDINGS, UNIT, RoundedCache
from benchmarks.memory.selections import pieces_of
from benchmarks.report import Progress
from deltadecode.lab.results import row

KV_DTYPES = ("int8", "fp8")


@torch.inference_mode()
def eight_bit_losses(
    model: Any,
    tokenizer: Any,
    plans: Sequence[dd.DeltaConfig],
    contexts: Sequence[int],
    *,
    texts: int,
    steps: int,
    file: str = "",
    progress: Progress = lambda case, done: None,
) -> list[dict[str, Any]]:
    """A row for each context and type: KL(full attention ‖ DELTA), the mean over all steps.

    Full attention has a cache of the model's type. ``added`` is what a cache adds to the KL of one
    that holds bfloat16; ``of_texts`` has that of each text.
    """
    rows: list[dict[str, Any]] = []
    parts = len(plans) * len(contexts)
    for at, (context, plan) in enumerate(product(contexts, plans)):
        found = []
        for number, ids in enumerate(pieces_of(tokenizer, context + steps + 1, texts, file)):
            case = f"context {context}, text {number}: K {plan.budget_pages}"
            progress(case, (at + number / texts) / parts)
            found.append(_text_losses(model, plan, ids, context, steps))
        base, *others = torch.stack(found).T
        for kv_dtype, means in zip(KV_DTYPES, others, strict=True):
            added = means - base
            rows.append(
                row(
                    f"context {context}, K {plan.budget_pages}: {kv_dtype}", "bfloat16", UNIT,
                    float(means.mean()), float(base.mean()), context=context,
                    budget_pages=plan.budget_pages, page_size=plan.page_size, texts=len(found),
                    steps=steps, kv_dtype=kv_dtype, added=round(float(added.mean()), 6),
                    of_texts=[round(one, 6) for one in added.tolist()],
                )
            )  # fmt: skip
    dd.disable(model)
    return rows


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
