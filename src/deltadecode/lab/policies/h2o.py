"""H2O (arXiv 2306.14048): heavy hitters by accumulated attention, and recent tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deltadecode.lab.policies.base import Floats, Layout, Scores, View
from deltadecode.lab.policies.masked import LayerAttention, MaskedPolicy
from deltadecode.lab.policies.pages import largest

_BLOCK_BYTES = 256 * 2**20  # of weights held at a time in prefill
_SPARE = 256  # slots
_LEAST = 4  # tokens of a budget


class H2O(MaskedPolicy):
    """Greedy eviction of the token with the least accumulated weight (section 4, algorithm 1).

    Half of the budget goes to recent tokens and half to heavy hitters (section 5). Each token
    adds up the softmax weights that it got from every query since it came, those of the prompt
    included; while the cache is over budget, the token with the least sum goes, recent ones
    excepted. Budgets are per layer and KV head.

    Under grouped-query attention, which the paper has not, the query heads of a KV head add up
    into one sum. The prompt is evicted at its end, not query by query as the algorithm has it,
    which is what the authors' code does too. The token being decoded counts in the budget.
    """

    name = "h2o"
    evicts = True
    history = True

    def __init__(self, layout: Layout, budget: int) -> None:
        super().__init__(layout, budget)
        if budget < _LEAST:
            raise self._refuse(f"it needs {_LEAST}, half of them recent")
        self.recent = budget // 2
        self._alive: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}

    def prefill(self, layer: int, query: Tensor, key: Tensor, scores: Scores, view: View) -> None:
        """Add up the prompt's weights, then keep the heavy hitters and the recent tokens."""
        sums = accumulated(query, key, scores, view, first=0).sum(dim=2)
        # One place is left for the first token to decode.
        kept = keep_heavy(sums, view, self.budget - 1, self.recent)
        self._alive[layer] = torch.nn.functional.pad(kept, (0, _SPARE), value=True)
        self._sums[layer] = torch.nn.functional.pad(sums, (0, _SPARE))

    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor:
        """Read all that is left."""
        del attention
        if view.slots > self._alive[layer].shape[2]:
            for states, value in ((self._alive, True), (self._sums, 0.0)):
                states[layer] = torch.nn.functional.pad(states[layer], (0, _SPARE), value=value)
        return self._alive[layer][:, :, None, : view.slots]

    def observe(self, layer: int, weights: Tensor, view: View) -> None:
        """Add this step's weights, and evict at most one token, which leaves room for the next."""
        alive = self._alive[layer][:, :, : view.slots]
        sums = self._sums[layer][:, :, : view.slots]
        sums += weights.sum(dim=2)
        exists = view.exists[:, None]
        recent = (view.position >= view.lengths[:, None] - self.recent)[:, None]
        rank = sums.masked_fill(~(alive & exists) | recent, torch.inf)
        victim = rank.argmin(dim=2, keepdim=True)
        over = (alive & exists).sum(dim=2, keepdim=True) >= self.budget
        alive.scatter_(2, victim, alive.gather(2, victim) & ~over)

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """The whole budget; see :meth:`Policy.expected`."""
        del prompt
        return np.minimum(lengths, self.budget)


def accumulated(query: Tensor, key: Tensor, scores: Scores, view: View, first: int) -> Tensor:
    """Weights that tokens get from the prompt's queries, added up; [B, Hkv, G, T] float32.

    Attention is causal. ``query`` is [B, Hq, T, D], ``key`` [B, Hkv, T, D]; queries in the padding
    and before slot ``first`` add nothing.
    """
    rows, heads, slots, _ = query.shape
    kv_heads = key.shape[1]
    total = query.new_zeros((rows, kv_heads, heads // kv_heads, slots), dtype=torch.float32)
    size = max(1, _BLOCK_BYTES // (4 * rows * heads * slots))
    slot = torch.arange(slots, device=key.device)
    exists = view.exists[:, None, None, None]
    for begin in range(first, slots, size):
        part = query[:, :, begin : begin + size]
        queries = slot[begin : begin + size]
        causal = slot <= queries[:, None]
        read = causal & exists & view.exists[:, None, None, begin : begin + size, None]
        total += scores.weights(scores.logits(part, key), read).sum(dim=3)
    return total


def keep_heavy(sums: Tensor, view: View, budget: int, recent: int) -> Tensor:
    """Mask of the ``recent`` last tokens and those with the largest sums; sums [B, Hkv, slots]."""
    exists = view.exists[:, None].expand(sums.shape)
    if view.slots <= budget:
        return exists
    forced = (view.position >= view.lengths[:, None] - recent)[:, None]
    rank = sums.masked_fill(forced, torch.inf).masked_fill(~exists, -torch.inf)
    return largest(rank, budget) & exists
