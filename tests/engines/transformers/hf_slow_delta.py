"""DELTA written a second time: one pass over the whole text, boolean masks, plain loops.

Nothing here comes from the package under test. The model runs teacher-forced over the whole text
with an attention function that computes all weights. A position t that was a decode step had
n = t + 1 tokens: in a sparse layer, its row of the mask is narrowed to the pages that the Δ-layer's
weights at the same position select.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

NAME = "slow_delta_of_the_tests"


@dataclass
class Rules:
    """A plan and a budget, spelled out."""

    page: int
    budget: int
    recent: int
    sink: int
    sparse: dict[int, int]  # sparse layer -> its Δ-layer
    steps: Sequence[int] = ()  # positions that were decode steps
    chosen: dict[int, list[set[int]]] = field(default_factory=dict)  # Δ-layer -> pages by position
    tokens_read: dict[int, int] = field(default_factory=dict)  # sparse layer -> over decode steps
    share: Fraction = Fraction(0)  # of the pages, where that is more than the budget


_rules: Rules | None = None


def select(weights: list[list[float]], rules: Rules) -> set[int]:
    """Pages that a decode step selects; weights [heads][n] of its Δ-layer."""
    n = len(weights[0])
    pages = (n + rules.page - 1) // rules.page
    budget = max(rules.budget, math.ceil(rules.share * pages))
    if pages <= budget:
        return set(range(pages))
    score = [0.0] * pages
    for token in range(n):
        score[token // rules.page] += max(head[token] for head in weights)
    chosen = set(range(pages - rules.recent, pages)) | set(range(rules.sink))
    rest = sorted(set(range(pages)) - chosen, key=lambda page: (-score[page], page))
    return chosen | set(rest[: budget - len(chosen)])


def _visible(layer: int, length: int, rules: Rules) -> Tensor:
    visible = torch.ones(length, length, dtype=torch.bool)
    for t in rules.steps:
        pages = rules.chosen[rules.sparse[layer]][t]
        row = [token // rules.page in pages for token in range(t + 1)]
        visible[t, : t + 1] = torch.tensor(row)
        rules.tokens_read[layer] = rules.tokens_read.get(layer, 0) + sum(row)
    return visible


def slow_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over a whole text [1, heads, T, D] under ``_rules``."""
    rules, layer = _rules, module.layer_idx
    assert rules is not None and query.shape[0] == 1
    heads, length = query.shape[1], query.shape[2]
    per_head = heads // key.shape[1]
    logits = torch.stack(
        [query[0, head] @ key[0, head // per_head].T * scaling for head in range(heads)]
    )
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + attention_mask[0, 0]
    if layer in rules.sparse:
        logits[:, ~_visible(layer, length, rules)] = float("-inf")
    sinks = torch.full((heads,), float("-inf")) if s_aux is None else s_aux
    top = torch.maximum(logits.max(dim=2).values, sinks[:, None])
    powers = (logits - top[..., None]).exp()
    weights = powers / (powers.sum(dim=2) + (sinks[:, None] - top).exp())[..., None]
    if layer in rules.sparse.values():
        listed = weights.tolist()
        rules.chosen[layer] = [
            select([head[t][: t + 1] for head in listed], rules) if t in rules.steps else set()
            for t in range(length)
        ]
    out = [weights[head] @ value[0, head // per_head] for head in range(heads)]
    return torch.stack(out, dim=1)[None], None


AttentionInterface.register(NAME, slow_attention)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def _following(rules: Rules) -> Iterator[None]:
    global _rules
    _rules = rules
    try:
        yield
    finally:
        _rules = None


def slow_logits(
    model: PreTrainedModel, tokens: Tensor, steps: Sequence[int], rules: Rules, **inputs: Any
) -> Tensor:
    """Logits [T, vocabulary] of the text ``tokens`` [1, T] with decode steps at ``steps``."""
    rules.steps, rules.chosen, rules.tokens_read = steps, {}, {}
    with torch.no_grad(), _following(rules):
        return model(tokens, use_cache=False, **inputs).logits[0]
