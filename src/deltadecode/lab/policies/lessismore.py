"""LessIsMore (arXiv 2508.07101): a few layers choose one set of tokens for all heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deltadecode.lab.policies.base import Floats, Layout, View
from deltadecode.lab.policies.layers import full_layers_mean, places_of
from deltadecode.lab.policies.masked import LayerAttention, MaskedPolicy
from deltadecode.lab.policies.pages import largest

_CORRECTION = 12 / 36  # of the depth: layer 12 of Qwen3-8B's 36 (section 4)


class LessIsMore(MaskedPolicy):
    """Unified token selection, and a recency window of a fixed share (section 3, figure 1).

    A selection layer reads everything. Of a budget of K tokens, ``recent_share`` r goes to the
    last tokens, of which the first ``sinks`` are taken off. Each query head ranks the tokens
    between them by its logits. The ranks of all heads are merged, the first of every head before
    the second of any, and the first K (1 - r) different tokens are read by all heads of the layers
    up to the next selection layer. Layers before the first selection layer read everything.

    By default layers 0 and 1 are full, layer 2 selects, and one layer at 12/36 of the depth
    selects again. The paper picks that layer for each model by a retrieval test, so other
    ``layers`` may be given. Nothing deviates but that: r = 0.25 and 4 sinks are the authors'.
    """

    name = "lessismore"

    def __init__(
        self,
        layout: Layout,
        budget: int,
        layers: Sequence[int] | None = None,
        recent_share: float = 0.25,
        sinks: int = 4,
    ) -> None:
        super().__init__(layout, budget)
        depth = len(layout.layers)
        self.selecting = places_of(
            self.name, layout, layers, [min(2, depth - 1), round(depth * _CORRECTION)]
        )
        self.chosen = int(budget * (1 - recent_share))
        self.sinks, self.recent = sinks, budget - self.chosen - sinks
        if self.chosen < 1 or self.recent < 1:
            raise self._refuse(f"it needs a token to choose and a recent one beside {sinks} sinks")
        self._read: Tensor | None = None

    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor | None:
        """Choose at a selection layer, else reuse."""
        if layer in self.selecting:
            self._read = self._merged(attention, view)
            return None
        return None if layer < self.selecting[0] else self._read

    def _merged(self, attention: LayerAttention, view: View) -> Tensor | None:
        if view.slots <= self.budget:
            return None
        forced = view.position >= (view.lengths - self.recent)[:, None]
        forced = forced | (view.position < self.sinks)
        logits = attention.logits.flatten(1, 2)
        logits = logits.masked_fill((forced | ~view.exists)[:, None], -torch.inf)
        order = logits.sort(dim=2, descending=True, stable=True).indices
        place = torch.arange(view.slots, device=order.device).expand(order.shape)
        rank = torch.empty_like(order).scatter_(2, order, place)
        heads = torch.arange(order.shape[1], device=order.device)[:, None]
        first = (rank * order.shape[1] + heads).amin(dim=1)  # [B, slots], where a token turns up
        first = first.masked_fill(forced | ~view.exists, torch.iinfo(torch.int64).max)
        return (largest(-first, self.chosen) | forced)[:, None, None]

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """Full layers read n, the others the budget; see :meth:`Policy.expected`."""
        del prompt
        full = self.selecting[0] + len(self.selecting)
        return full_layers_mean(self.layout, full, lengths, np.minimum(lengths, self.budget))
