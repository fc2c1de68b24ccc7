"""DELTA with one of its choices changed, for ablations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltadecode.config import DeltaConfig, LayerPlan
from deltadecode.errors import PolicyError
from deltadecode.lab.policies.base import Floats, Layout, View
from deltadecode.lab.policies.delta import Delta
from deltadecode.lab.policies.masked import LayerAttention, MaskedPolicy
from deltadecode.lab.policies.pages import page_mask, page_sums, page_tokens
from deltadecode.ops import select_pages

# Scores of tokens [B, slots] from the weights of all query heads [B, Hq, slots].
_POOLED: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda weights: weights.amax(dim=1),
    "mean": lambda weights: weights.mean(dim=1),
    "rms": lambda weights: weights.square().mean(dim=1).sqrt(),
    "two": lambda weights: weights.topk(min(2, weights.shape[1]), dim=1).values.mean(dim=1),
}


class DeltaVariant(MaskedPolicy):
    """DELTA as a masked policy; with the default options it decodes as :class:`Delta` does.

    ``heads``: over query heads, a token's score is the ``"max"`` of its weights (R2), the
    ``"mean"``, the root of the mean square (``"rms"``) or the mean of the two largest (``"two"``);
    with ``"kv"`` each KV head reads pages of its own, by the maximum over its query heads.
    ``accumulate``: so much of the scores of the Δ-layer before, which has its own part of those
    before it, is added to a Δ-layer's scores. ``per_layer`` 1: a sparse layer chooses pages by its
    own weights instead of taking those of its Δ-layer; like the oracle it is then not charged for
    looking. ``refresh``: pages are chosen at every so many steps; at those between, all layers but
    the dense ones read the last choice, recent and sink pages. 1 is DELTA.
    """

    name = "delta-variant"

    def __init__(
        self,
        layout: Layout,
        budget: int,
        cfg: DeltaConfig,
        plan: LayerPlan,
        heads: str = "max",
        per_layer: int = 0,
        refresh: int = 1,
        accumulate: float = 0.0,
    ) -> None:
        super().__init__(layout, budget)
        if heads not in (*_POOLED, "kv"):
            known = ", ".join(_POOLED)
            raise PolicyError(f"heads of policy {self.name!r} must be {known} or kv, got {heads!r}")
        if refresh < 1:
            raise PolicyError(f"refresh of policy {self.name!r} must be at least 1, got {refresh}")
        self._exact = Delta(layout, budget, cfg, plan)
        self.cfg, self.plan = self._exact.cfg, plan
        self.heads, self.per_layer, self.refresh = heads, per_layer, refresh
        self.accumulate = accumulate
        self.history = refresh > 1
        self._chosen: dict[int, Tensor] = {}
        self._scores: Tensor | None = None

    @classmethod
    def make(
        cls, model: Any, layout: Layout, budget: int, heads: str = "max", per_layer: int = 0,
        refresh: int = 1, accumulate: float = 0.0, **fields: Any,
    ) -> DeltaVariant:  # fmt: skip
        """The model's own plan, with some fields of it replaced."""
        exact = Delta.make(model, layout, budget, **fields)
        return cls(layout, budget, exact.cfg, exact.plan, heads, per_layer, refresh, accumulate)

    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor | None:
        """Choose at a Δ-layer, else take the choice of the Δ-layer before."""
        number = self.layout.layers[layer]
        role = self.plan.role(number)
        if role == "dense":
            return None
        source = self.plan.source(number)
        source = number if source is None else source
        fresh = view.step % self.refresh == 0
        choosing = role == "delta" or self.per_layer
        if choosing and fresh:
            if number == self.cfg.delta_layers[0]:
                self._scores = None
            self._chosen[number] = self._choose(attention, view)
        if role == "delta" and fresh:
            return None
        chosen = self._chosen[number if self.per_layer else source]
        if not fresh:
            chosen = self._extended(chosen, view)
        return page_tokens(chosen, view, self.cfg.page_size)[:, :, None]

    def _choose(self, attention: LayerAttention, view: View) -> Tensor:
        """[B, Hkv or 1, N]: the pages that KV heads read."""
        if self.heads == "kv":
            scores = attention.weights.amax(dim=2)
        else:
            scores = _POOLED[self.heads](attention.weights.flatten(1, 2))[:, None]
        if self.accumulate:
            if self._scores is not None:
                scores = scores + self.accumulate * self._scores
            self._scores = scores
        cfg = self.cfg
        page_scores = page_sums(scores, view, cfg.page_size)
        chosen = []
        for of_head in page_scores.unbind(dim=1):
            ids, _ = select_pages(of_head, view.lengths.int(), cfg)
            chosen.append(page_mask(ids, of_head.shape[1]))
        return torch.stack(chosen, dim=1)

    def _extended(self, chosen: Tensor, view: View) -> Tensor:
        """An older choice, with the recent pages of now; the newest page has come since."""
        size = self.cfg.page_size
        count = -(-view.slots // size)
        chosen = torch.nn.functional.pad(chosen, (0, count - chosen.shape[-1]))
        page = torch.arange(count, device=chosen.device)
        last = (view.lengths[:, None] - 1) // size
        recent = (page > last - max(self.cfg.recent_pages, 1)) & (page <= last)
        return chosen | recent[:, None]

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """As DELTA at a step that chooses, else the budget; see :meth:`Policy.expected`."""
        fresh = self._exact.expected(lengths, prompt)
        between = np.minimum(lengths, self._exact.pages_for(lengths) * self.cfg.page_size)
        dense = sum(self.plan.role(layer) == "dense" for layer in self.layout.layers)
        dense_share = dense / len(self.layout.layers)
        between = dense_share * lengths + (1 - dense_share) * between
        mean: Floats = fresh / self.refresh + between * (1 - 1 / self.refresh)
        return mean
