"""Attention to pages and selections of the observed decode steps, by step, layer and page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.lab.inspection.measure import LayerRows
from deltadecode.lab.plans import Matrix
from deltadecode.ops import select_pages

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class PageMap:
    """One generation by step, layer and page.

    ``steps`` and ``lengths`` [steps] int64 are the number of each observed decode step and its
    tokens n. ``mass`` [steps, layers, N] float32 is the mean over query heads of α, summed over the
    page. ``selected``, like it, are the pages that each layer's own scores S_u would select (R4).
    ``chosen`` is ``selected`` without the pages that are forced at that step, recent and sink ones,
    and without steps of no more pages than the budget: what the scores decide. ``finds_first``
    [steps, layers]: whether a layer's scores select page 0 when it is not forced in.
    """

    page_size: int
    steps: NDArray[np.int64]
    lengths: NDArray[np.int64]
    mass: NDArray[np.float32]
    selected: Bools
    chosen: Bools
    finds_first: Bools

    @classmethod
    def of(
        cls, config: DeltaConfig, steps: Tensor, lengths: Tensor, layers: Sequence[LayerRows]
    ) -> PageMap:
        """Select at the observed rows of each layer; the layers of the plan are not looked at."""
        scores = torch.stack([layer.page_scores for layer in layers], dim=1)
        mass = torch.stack([layer.page_mass for layer in layers], dim=1)
        selected = _selected(scores, lengths, config)
        free = selected
        if config.sink_pages:
            free = _selected(scores, lengths, replace(config, sink_pages=0))
        chosen = selected.clone()
        used = -(-lengths // config.page_size)
        page = torch.arange(scores.shape[2])
        chosen[(page >= used[:, None] - config.recent_pages)[:, None].expand_as(chosen)] = False
        chosen[:, :, : config.sink_pages] = False
        chosen[used <= config.budget_pages] = False
        return cls(
            config.page_size, steps.numpy(), lengths.numpy(), mass.numpy(), selected.numpy(),
            chosen.numpy(), free[:, :, 0].numpy(),
        )  # fmt: skip

    def captured(self) -> Matrix:
        """R [layers, layers]: share of layer j's attention on the pages that layer i selects.

        Σ of m_j(u) over the pages of i ÷ Σ of all m_j(u), averaged over the steps over the budget;
        NaN without any. The diagonal is what a layer could keep at best. The divisor is 1 but for
        learned sinks.
        """
        over = self.over_budget
        mass = self.mass[over]
        shares = mass / mass.sum(axis=2, keepdims=True)
        captured: Matrix = _mean_steps(
            self.selected[over].astype(np.float32) @ shares.transpose(0, 2, 1)
        )
        return captured

    @property
    def over_budget(self) -> Bools:
        """[steps] bool: whether there was anything to decide."""
        return np.asarray(self.chosen.any(axis=(1, 2)))

    def overlap(self) -> Matrix:
        """Jaccard overlap [layers, layers] of the pages that two layers choose at one step.

        Pages of both ÷ pages of either, averaged over the steps over the budget; NaN without any.
        """
        chosen = self.chosen[self.over_budget].astype(np.float32)
        both = chosen @ chosen.transpose(0, 2, 1)
        sizes = chosen.sum(axis=2)
        either = sizes[:, :, None] + sizes[:, None, :] - both
        overlap: Matrix = _mean_steps(both / np.maximum(either, 1))
        return overlap

    def lags(self) -> NDArray[np.int64]:
        """[lags] int64: decode steps from 0 to half of the span that was observed over the budget.

        Of fewer than two such steps there is none.
        """
        steps = self.steps[self.over_budget]
        lags: NDArray[np.int64] = (steps - steps[:1])[: len(steps) // 2 + 1]
        return lags if len(steps) > 1 else lags[:0]

    def drift(self, layer: int) -> Matrix:
        """How many of the pages that a layer (by place) chooses it has chosen before, [lags].

        Jaccard overlap of the pages chosen at two steps that are so far apart, averaged over such
        pairs.
        """
        chosen = self.chosen[self.over_budget, layer].astype(np.float32)
        both = chosen @ chosen.T
        sizes = chosen.sum(axis=1)
        return self._by_lag(both / np.maximum(sizes[:, None] + sizes[None] - both, 1))

    def held(self, layer: int) -> Matrix:
        """How much of a layer's (by place) attention its own older choice still holds, [lags].

        Share of the attention at a step on the pages that were chosen so many steps before, with
        the recent and sink pages of the step itself.
        """
        over = self.over_budget
        mass, chosen = self.mass[over, layer], self.chosen[over, layer]
        forced = self.selected[over, layer] & ~chosen
        free = chosen.astype(np.float32) @ np.where(forced, 0, mass).T  # [chosen at, read at]
        now = np.where(forced, mass, 0).sum(axis=1)
        return self._by_lag((free + now) / np.maximum(mass.sum(axis=1), 1e-30))

    def chance(self) -> float:
        """Jaccard overlap of two random choices, about; NaN without a step over the budget.

        Of M pages each takes k at random: k/M ÷ (2 − k/M).
        """
        over = self.over_budget
        forced = self.selected[over, 0] & ~self.chosen[over, 0]
        free = -(-self.lengths[over] // self.page_size) - forced.sum(axis=1)
        share = self.chosen[over, 0].sum(axis=1) / np.maximum(free, 1)
        return float((share / (2 - share)).mean()) if len(share) else float("nan")

    def _by_lag(self, pairs: NDArray[np.float32]) -> Matrix:
        """Mean of each diagonal of [earlier step, later step]."""
        count = len(self.lags())
        return np.array([np.diagonal(pairs, lag).mean() for lag in range(count)], dtype=float)


def _selected(scores: Tensor, lengths: Tensor, config: DeltaConfig) -> Tensor:
    """Mask of the pages that scores [steps, layers, N] select."""
    steps, layers, pages = scores.shape
    lens = lengths.int().repeat_interleave(layers)
    ids, _ = select_pages(scores.reshape(steps * layers, pages), lens, config)
    # One place more, for the -1 of rows with fewer pages than K.
    chosen = torch.zeros(steps * layers, pages + 1, dtype=torch.bool)
    chosen.scatter_(1, torch.where(ids < 0, pages, ids.long()), True)
    return chosen[:, :pages].view(steps, layers, pages)


def _mean_steps(values: NDArray[np.float32]) -> Matrix:
    if not len(values):
        return np.full(values.shape[1:], np.nan)
    mean: Matrix = values.mean(axis=0, dtype=np.float64)
    return mean
