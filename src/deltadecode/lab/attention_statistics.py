"""What is kept of an observed generation: captured mass R[i, j], and the shift between layers.

Nothing grows with the length of a text: :class:`Captured` holds the pages of one decode step, and
sums of (problems · budgets · layers²) float64; :class:`Shift` holds one row of attention, and sums
of (problems · layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.errors import CalibrationError
from deltadecode.lab.observe import LayerStep
from deltadecode.lab.plans import Matrix
from deltadecode.ops import select_pages


@dataclass(frozen=True, order=True)
class PageBudget:
    """How pages are selected: K pages, the last L and the first S of them always; K > L + S."""

    budget_pages: int
    recent_pages: int
    sink_pages: int = 0

    def config(self, page_size: int) -> DeltaConfig:
        """The same as a configuration without layers; checks the numbers."""
        return DeltaConfig(
            page_size=page_size,
            budget_pages=self.budget_pages,
            recent_pages=self.recent_pages,
            sink_pages=self.sink_pages,
            dense_layers=(),
            delta_layers=(),
        )


class Captured:
    """R[i, j]: share of layer j's attention that lies on the pages that layer i's scores select.

    With m_j(u) the mean over query heads of layer j's attention to page u and T_i the pages that
    :func:`deltadecode.ops.select_pages` takes by layer i's own S_u,
    R[i, j] = Σ_{u ∈ T_i} m_j(u) ÷ Σ_u m_j(u), averaged over the observed steps with more than K
    pages; of a step with no more pages every layer captures everything, and it is left out. The
    diagonal is what a layer could keep at best. The divisor is 1 but for learned sinks.
    """

    def __init__(
        self, problems: int, layers: int, budgets: Sequence[PageBudget], page_size: int
    ) -> None:
        self.budgets, self.page_size = tuple(dict.fromkeys(budgets)), page_size
        self._configs = [budget.config(page_size) for budget in self.budgets]
        # [problem, budget, i, j] and [problem, budget]
        self._sums = torch.zeros(problems, len(self.budgets), layers, layers, dtype=torch.float64)
        self._steps = torch.zeros(problems, len(self.budgets), dtype=torch.float64)
        self._scores: list[Tensor] = []
        self._mass: list[Tensor] = []

    def observe_layer(self, seen: LayerStep) -> None:
        """Keep the pages of a layer until the step has all of them; see :class:`LayerObserver`."""
        if seen.place == 0:
            self._scores, self._mass = [], []
        place = self._mass[0].device if self._mass else seen.page_mass.device
        self._scores.append(seen.page_scores.to(place))
        self._mass.append(seen.page_mass.to(place))
        if not seen.last:
            return
        mass = torch.stack(self._mass, dim=1)  # [B, layers, N]
        mass = mass / mass.sum(dim=2, keepdim=True)
        scores = torch.stack(self._scores, dim=1)
        self._scores, self._mass = [], []
        lengths = seen.view.lengths.to(place)
        for number, config in enumerate(self._configs):
            over = lengths > config.budget_pages * self.page_size
            used = (over & seen.active.to(place)).cpu()
            if bool(used.any()):
                shares = _captured(scores, mass, lengths, config).double().cpu()
                rows = seen.problems.cpu()[used]
                self._sums[rows, number] += shares[used]
                self._steps[rows, number] += 1

    def matrix(self, budget: PageBudget, problems: Sequence[int] | None = None) -> Matrix:
        """R [layers, layers] over some texts (default: all), each observed step weighing the same.

        Indices are places among the full-attention layers. Raises CalibrationError when no observed
        step has more than K pages.
        """
        number = self.budgets.index(budget)
        rows = slice(None) if problems is None else list(problems)
        steps = float(self._steps[rows, number].sum())
        if not steps:
            raise CalibrationError(
                f"no observed step has more than {budget.budget_pages} pages of "
                f"{self.page_size} tokens, so that nothing can be measured; give longer prompts, "
                "more new tokens or fewer budget pages"
            )
        matrix: Matrix = (self._sums[rows, number].sum(dim=0) / steps).numpy()
        return matrix

    def steps(self, budget: PageBudget, problems: Sequence[int] | None = None) -> int:
        """Observed steps behind :meth:`matrix`, the rows of a batch one by one."""
        rows = slice(None) if problems is None else list(problems)
        return int(self._steps[rows, self.budgets.index(budget)].sum())


def _captured(scores: Tensor, mass: Tensor, lengths: Tensor, config: DeltaConfig) -> Tensor:
    """R of one step; scores and mass [B, layers, N] to [B, layers i, layers j]."""
    rows, layers, pages = scores.shape
    lens = lengths.int().repeat_interleave(layers)
    ids, _ = select_pages(scores.reshape(rows * layers, pages), lens, config)
    # One place more, for the -1 of rows with fewer pages than K.
    chosen = mass.new_zeros(rows * layers, pages + 1)
    chosen.scatter_(1, torch.where(ids < 0, pages, ids.long()), 1.0)
    return chosen[:, :pages].view(rows, layers, pages) @ mass.transpose(1, 2)


class Shift:
    """The paper's shift d(l - 1, l) = 1 - cos(a_{l-1}, a_l) between adjacent layers.

    a_l is the mean over query heads of layer l's attention at one decode step, a vector over the
    tokens; the shift is averaged over the observed steps (arXiv 2510.09883 leaves open how heads
    and steps are put together).
    """

    def __init__(self, problems: int, layers: int) -> None:
        self._sums = torch.zeros(problems, layers, dtype=torch.float64)
        self._steps = torch.zeros(problems, dtype=torch.float64)
        self._before = torch.zeros(0)

    def observe_layer(self, seen: LayerStep) -> None:
        """Compare a layer with the one before; see :class:`LayerObserver`."""
        now = seen.probabilities.mean(dim=1)
        used = seen.active.cpu()
        rows = seen.problems.cpu()[used]
        if seen.place:
            similar = torch.cosine_similarity(self._before.to(now.device), now, dim=1)
            self._sums[rows, seen.place] += 1 - similar.double().cpu()[used]
        else:
            self._steps[rows] += 1
        self._before = now

    def curve(self, problems: Sequence[int] | None = None) -> Matrix:
        """The shift into each layer, [layers], over some texts (default: all); the first is 0."""
        rows = slice(None) if problems is None else list(problems)
        steps = self._steps[rows].sum().clamp(min=1)
        curve: Matrix = (self._sums[rows].sum(dim=0) / steps).numpy()
        return curve
