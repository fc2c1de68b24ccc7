"""TidalDecode (arXiv 2410.05076): a few layers choose tokens, the others reuse them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deltadecode.lab.policies.base import Floats, Layout, View
from deltadecode.lab.policies.layers import full_layers_mean, places_of
from deltadecode.lab.policies.masked import LayerAttention, MaskedPolicy
from deltadecode.lab.policies.pages import largest

_CORRECTION = 13 / 32  # of the depth: layer 13 of Llama-3-8B's 32 (section 4)


class Tidal(MaskedPolicy):
    """Position-persistent sparse attention over single tokens (section 3, algorithm 1).

    Selection layers read everything and choose the tokens with the largest logits; layers before
    the first of them read everything; the others read what the last selection layer chose. By
    default layers 0 and 1 are full, layer 2 selects, and one correction layer selects again; the
    paper picks that layer for each model by a retrieval test, so other ``layers`` may be given.

    As in the authors' evaluation code each *query* head chooses its own tokens (``shared`` 0); the
    tokens read are those that any query head of a KV head reads, up to G times the budget. With
    ``shared`` 1 (``tidal-kv``) the heads of a KV head choose together, by the largest of their
    softmax weights, and read exactly the budget.

    Deviation: no cache correction (section 3.3), the optional recomputation of old keys and values
    in chunks. As in the paper no token is forced, the new one neither; with ``recent`` and
    ``sinks``, an option of the authors' later code, the last and first tokens take their share of
    the budget.
    """

    name = "tidal"

    def __init__(
        self,
        layout: Layout,
        budget: int,
        layers: Sequence[int] | None = None,
        shared: int = 0,
        recent: int = 0,
        sinks: int = 0,
    ) -> None:
        super().__init__(layout, budget)
        self.shared, self.recent, self.sinks = shared, recent, sinks
        if budget <= recent + sinks:
            raise self._refuse(f"it needs more than {recent} recent tokens and {sinks} sinks")
        depth = len(layout.layers)
        self.selecting = places_of(
            self.name, layout, layers, [min(2, depth - 1), round(depth * _CORRECTION)]
        )
        self._chosen: Tensor | None = None

    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor | None:
        """Choose at a selection layer, else reuse."""
        del view
        if layer in self.selecting:
            self._chosen = self._top(attention)
            return None
        return None if layer < self.selecting[0] else self._chosen

    def _top(self, attention: LayerAttention) -> Tensor | None:
        view = attention.view
        if view.slots <= self.budget:
            return None
        position, exists = view.position[:, None, None], view.exists[:, None, None]
        forced = (position >= (view.lengths - self.recent)[:, None, None, None]) | (
            position < self.sinks
        )
        rank = attention.weights.amax(dim=2, keepdim=True) if self.shared else attention.logits
        rank = rank.masked_fill(forced, torch.inf).masked_fill(~exists, -torch.inf)
        return largest(rank, self.budget)

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """At most: if query heads that share keys agree on nothing; see :meth:`Policy.expected`."""
        del prompt
        group = 1 if self.shared else self.layout.query_heads // self.layout.kv_heads
        most = np.where(lengths <= self.budget, lengths, self.budget * group)
        full = self.selecting[0] + len(self.selecting)
        return full_layers_mean(self.layout, full, lengths, np.minimum(lengths, most))
