"""What is kept of a watched generation to draw it: page maps, selections and entropies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.errors import InspectionError
from deltadecode.lab.observe import LayerStep
from deltadecode.lab.plans import Matrix
from deltadecode.ops import select_pages

Bools = NDArray[np.bool_]


class PageMaps:
    """The attention to pages, and the pages that would be selected, of every observed step.

    Keeps 5 bytes per observed step, full-attention layer and page; nothing per token or head. One
    text only. The layers of the configuration are not looked at.
    """

    def __init__(self, config: DeltaConfig) -> None:
        self.config = config
        self.steps: list[int] = []
        self.lengths: list[int] = []
        self._mass: list[list[Tensor]] = []
        self._selected: list[list[Tensor]] = []

    def observe_layer(self, seen: LayerStep) -> None:
        """Keep one layer of one step; see :class:`deltadecode.lab.observe.LayerObserver`."""
        if seen.place == 0:
            self.steps.append(seen.step)
            self.lengths.append(int(seen.view.lengths[0]))
            self._mass.append([])
            self._selected.append([])
        self._mass[-1].append(seen.page_mass[0].cpu())
        lens = seen.view.lengths[:1].int()
        ids, counts = select_pages(seen.page_scores[:1], lens, self.config)
        selected = torch.zeros(seen.page_scores.shape[1], dtype=torch.bool)
        selected[ids[0, : int(counts[0])].long().cpu()] = True
        self._selected[-1].append(selected)

    def finish(self) -> PageMap:
        """Put the steps together; InspectionError when none was observed."""
        if not self.steps:
            raise InspectionError(
                "no decode step was observed: the model ended its text with the first token; give "
                "another prompt"
            )
        pages = max(len(layers[0]) for layers in self._mass)
        shape = (len(self.steps), len(self._mass[0]), pages)
        mass, selected = np.zeros(shape, np.float32), np.zeros(shape, np.bool_)
        for step, (weights, chosen) in enumerate(zip(self._mass, self._selected, strict=True)):
            for layer in range(shape[1]):
                used = len(weights[layer])
                mass[step, layer, :used] = weights[layer].numpy()
                selected[step, layer, :used] = chosen[layer].numpy()
        return PageMap(
            page_size=self.config.page_size,
            steps=np.array(self.steps),
            lengths=np.array(self.lengths),
            mass=mass,
            selected=selected,
            chosen=self._chosen(selected),
        )

    def _chosen(self, selected: Bools) -> Bools:
        config, chosen = self.config, selected.copy()
        for step, length in enumerate(self.lengths):
            used = -(-length // config.page_size)
            if used <= config.budget_pages:
                chosen[step] = False
                continue
            chosen[step, :, used - config.recent_pages :] = False
            chosen[step, :, : config.sink_pages] = False
        return chosen


@dataclass(frozen=True)
class PageMap:
    """One generation by step, layer and page.

    ``steps`` and ``lengths`` [steps] int64 are the number of each observed decode step and its
    tokens n. ``mass`` [steps, layers, N] float32 is the mean over query heads of α, summed over the
    page. ``selected``, like it, are the pages that each layer's own scores S_u would select (R4).
    ``chosen`` is ``selected`` without the pages that are forced at that step, recent and sink ones,
    and without steps of no more pages than the budget: what the scores decide.
    """

    page_size: int
    steps: NDArray[np.int64]
    lengths: NDArray[np.int64]
    mass: NDArray[np.float32]
    selected: Bools
    chosen: Bools

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


class Entropy:
    """Entropy of each head's attention, averaged over the observed steps.

    With learned sinks, of what a head spends on tokens, scaled to 1.
    """

    def __init__(self, layers: int, heads: int) -> None:
        self._bits = torch.zeros(layers, heads, dtype=torch.float64)
        self._steps = 0

    def observe_layer(self, seen: LayerStep) -> None:
        """Add one layer of one step; see :class:`deltadecode.lab.observe.LayerObserver`."""
        weights = seen.tokens(0)
        weights = weights / weights.sum(dim=1, keepdim=True)
        # 0 · log 0 is 0.
        bits = -torch.special.xlogy(weights, weights).sum(dim=1) / np.log(2.0)
        self._bits[seen.place] += bits.double().cpu()
        self._steps += seen.last

    def bits(self) -> Matrix:
        """[layers, Hq] float64, in bits; 2 to its power is a number of equally weighted tokens."""
        bits: Matrix = (self._bits / max(self._steps, 1)).numpy()
        return bits


def _mean_steps(values: NDArray[np.float32]) -> Matrix:
    if not len(values):
        return np.full(values.shape[1:], np.nan)
    mean: Matrix = values.mean(axis=0, dtype=np.float64)
    return mean
