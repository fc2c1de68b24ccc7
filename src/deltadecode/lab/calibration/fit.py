"""From what was measured to plans: ours, the paper's, and what each keeps of texts it has not seen.

Plans are fitted on the texts with even numbers, and judged on the odd ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltadecode.config import DeltaConfig
from deltadecode.errors import CalibrationError, PolicyError
from deltadecode.lab import plans
from deltadecode.lab.attention_statistics import Captured, PageBudget, Shift
from deltadecode.lab.calibration.need import Need
from deltadecode.lab.observe import Progress, Prompt, observe
from deltadecode.lab.plans import Places
from deltadecode.lab.policies.base import Floats, Layout
from deltadecode.lab.policies.delta import Delta


@dataclass(frozen=True)
class PlanRequest:
    """The plan that is asked for.

    ``base`` gives page size, budget, recent and sink pages. For a ``fraction`` (attended) the
    budget is solved; without ``deltas`` it is solved for every number of full layers, and the one
    that keeps most is taken, its dense layers chosen with it. A ``recall`` instead of the two asks
    for the fewest Δ-layers that keep so much.
    """

    base: DeltaConfig
    dense: int
    deltas: int | None = None
    fraction: float | None = None
    recall: float | None = None

    def check(self, layers: int) -> None:
        """Refuse what cannot be, for a model of so many full-attention layers."""
        if self.recall is not None and (self.deltas is not None or self.fraction is not None):
            raise CalibrationError(
                "a recall decides the number of Δ-layers; give neither that nor a fraction with it"
            )
        if self.deltas is None and self.fraction is None and self.recall is None:
            raise CalibrationError("give a number of Δ-layers, an attended fraction or a recall")
        for name, value in (("attended fraction", self.fraction), ("recall", self.recall)):
            if value is not None and not 0 < value < 1:
                raise CalibrationError(f"{name} must be between 0 and 1, got {value:g}")
        plans.check_size(layers, self.dense + (1 if self.deltas is None else self.deltas),
                         self.dense)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A plan by place among the full-attention layers, with its pages."""

    full: Places  # places of the full layers
    dense: int  # how many of them are dense
    budget: PageBudget


class Measurement:
    """Full attention on at least two texts, as far as plans need it."""

    def __init__(
        self, model: Any, prompts: Sequence[Prompt], request: PlanRequest, new_tokens: int
    ) -> None:
        if len(prompts) < 2:
            raise CalibrationError(
                f"calibration needs at least 2 texts, one to fit and one to judge, got "
                f"{len(prompts)}"
            )
        self.layout, self.prompts, self.request = Layout.of(model), list(prompts), request
        self.new_tokens = new_tokens
        layers = len(self.layout.layers)
        request.check(layers)
        base, problems = request.base, len(prompts)
        self.sizes = self._sizes(layers)
        self.captured = Captured(problems, layers, self._budgets(), base.page_size)
        self.shift = Shift(problems, layers)
        self.need = Need(
            model, problems, self.layout.layers, base.page_size, base.recent_pages, base.sink_pages
        )
        self.fit, self.held_out = range(0, problems, 2), range(1, problems, 2)

    def run(self, model: Any, tokenizer: Any, progress: Progress, **options: int) -> None:
        """Generate and measure; options as of :func:`observe`."""
        observers = (self.captured, self.shift, self.need)
        observe(
            model, tokenizer, self.prompts, observers, page_size=self.request.base.page_size,
            new_tokens=self.new_tokens, progress=progress, **options,
        )  # fmt: skip

    def fraction(self, full: int, budget: PageBudget) -> float:
        """Attended fraction of a plan with so many full layers, over the decode steps here."""
        layers = len(self.layout.layers)
        cfg = budget.config(self.request.base.page_size)
        cfg = DeltaConfig(**{**cfg.to_dict(), "delta_layers": tuple(range(full))})
        plan = cfg.layer_plan(layers)
        layout = Layout(tuple(range(layers)), self.layout.query_heads, self.layout.kv_heads)
        policy = Delta(layout, cfg.budget_pages * cfg.page_size, cfg, plan)
        lengths = self._lengths()
        return float(policy.expected(lengths, 0).sum() / lengths.sum())

    def _lengths(self) -> Floats:
        steps = np.arange(1.0, self.new_tokens)
        return np.concatenate([len(prompt.ids) + steps for prompt in self.prompts])

    def _sizes(self, layers: int) -> dict[int, PageBudget]:
        """Number of full layers, to the pages that go with it."""
        request, base = self.request, self.request.base
        budget = PageBudget(base.budget_pages, base.recent_pages, base.sink_pages)
        if request.recall is not None:
            return {count: budget for count in range(request.dense + 1, layers)}
        counts = range(1, layers) if request.deltas is None else [request.dense + request.deltas]
        if request.fraction is None:
            return {count: budget for count in counts}
        solved = {count: self._pages(count, request.fraction) for count in counts}
        possible = {count: budget for count, budget in solved.items() if budget is not None}
        if not possible:
            raise CalibrationError(
                f"no plan with {counts[0]} full layers of {layers} reads as little as a fraction "
                f"of {request.fraction:g} of these texts with {base.recent_pages} recent and "
                f"{base.sink_pages} sink pages"
            )
        return possible

    def _pages(self, full: int, fraction: float) -> PageBudget | None:
        """The most pages with which a plan reads no more than a fraction; None if none do."""
        base = self.request.base
        least = base.recent_pages + base.sink_pages + 1
        most = int(self._lengths().max()) // base.page_size + 1

        def reads(pages: int) -> float:
            try:
                return self.fraction(full, PageBudget(pages, base.recent_pages, base.sink_pages))
            except PolicyError:
                return 1.0

        if reads(least) > fraction:
            return None
        low, high = least, max(most, least + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if reads(middle) <= fraction else (low, middle)
        return PageBudget(low, base.recent_pages, base.sink_pages)

    def _budgets(self) -> list[PageBudget]:
        """All that is measured: the pages of each size, and other L and S for a plan of one K."""
        budgets = list(dict.fromkeys(self.sizes.values()))
        if len(budgets) == 1:
            budgets += offers(budgets[0])
        return budgets


def offers(budget: PageBudget) -> list[PageBudget]:
    """Other L, from 1 to half the budget, and other S, with the same K."""
    pages, recent, sink = budget.budget_pages, budget.recent_pages, budget.sink_pages
    recents = sorted({1, recent // 2, 2 * recent, pages // 2} - {0, recent})
    budgets = [PageBudget(pages, other, sink) for other in recents if other + sink < pages]
    sinks = [other for other in (0, 1, 2) if other != sink and recent + other < pages]
    return budgets + [PageBudget(pages, recent, other) for other in sinks]


def fitted(measurement: Measurement) -> dict[str, Candidate]:
    """Plans of one size: ``calibrated``, ``captured-mass`` (without weights) and ``cosine-shift``.

    Raises CalibrationError when nothing was measured, or no plan reaches the recall.
    """
    need, request = measurement.need.weights(measurement.fit), measurement.request
    chosen = request.deltas is None and request.recall is None
    dense = 0 if chosen else request.dense

    def best(count: int, weights: Floats | None) -> tuple[float, Places]:
        r = measurement.captured.matrix(measurement.sizes[count], measurement.fit)
        loss = plans.losses(r, weights)
        full = plans.best_plan(loss, count, dense)
        return plans.kept(loss, full), full

    reached = {count: best(count, need) for count in measurement.sizes}
    if request.recall is not None:
        enough = [count for count, (share, _) in reached.items() if share >= request.recall]
        if not enough:
            most = max(share for share, _ in reached.values())
            raise CalibrationError(
                f"no plan keeps {request.recall:g} of the attention; the most is {most:.4f}"
            )
        count = enough[0]
    else:
        count = max(reached, key=lambda size: reached[size][0])
    budget, full = measurement.sizes[count], reached[count][1]
    if chosen:
        dense = plans.leading_dense(full)
    unweighted = best(count, None)[1]
    paper = plans.paper_plan(measurement.shift.curve(measurement.fit), count, dense)
    return {
        "calibrated": Candidate(full, dense, budget),
        "captured-mass": Candidate(
            unweighted, plans.leading_dense(unweighted) if chosen else dense, budget
        ),
        "cosine-shift": Candidate(paper, dense, budget),
    }


def described(measurement: Measurement, plan: Candidate) -> dict[str, Any]:
    """A plan's DeltaConfig fields with its ``kept``, ``recall`` and ``attended_fraction``.

    ``kept`` and ``recall`` are each of the texts that were fitted and of those held out.
    """
    numbers = measurement.layout.layers
    dense, delta = plans.dense_and_delta(plan.full, numbers, plan.dense)
    halves = {"fit": measurement.fit, "held_out": measurement.held_out}
    # Both halves are weighed alike, or their shares would not be of the same thing.
    need = measurement.need.weights(measurement.fit)
    kept, recalls = {}, {}
    for name, texts in halves.items():
        r = measurement.captured.matrix(plan.budget, texts)
        kept[name] = round(plans.kept(plans.losses(r, need), plan.full), 5)
        recalls[name] = round(plans.recall(r, plan.full), 5)
    return {
        "page_size": measurement.request.base.page_size,
        "budget_pages": plan.budget.budget_pages,
        "recent_pages": plan.budget.recent_pages,
        "sink_pages": plan.budget.sink_pages,
        "dense_layers": list(dense),
        "delta_layers": list(delta),
        "kept": kept,
        "recall": recalls,
        "attended_fraction": round(measurement.fraction(len(plan.full), plan.budget), 5),
    }


def offered(measurement: Measurement, plan: Candidate) -> list[dict[str, Any]]:
    """What the plan of the same size keeps with other recent and sink pages, best first.

    Entries are as of :func:`described`; none where only one page budget was measured.
    """
    need = measurement.need.weights(measurement.fit)
    lines = []
    for budget in measurement.captured.budgets:
        if budget.budget_pages != plan.budget.budget_pages:
            continue
        loss = plans.losses(measurement.captured.matrix(budget, measurement.fit), need)
        full = plans.best_plan(loss, len(plan.full), plan.dense)
        lines.append(described(measurement, Candidate(full, plan.dense, budget)))
    return sorted(lines, key=lambda line: -line["kept"]["fit"])
