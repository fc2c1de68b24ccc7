"""Ablations of DELTA: its own choices, changed one at a time (arXiv 2510.09883, section 5)."""

from __future__ import annotations

from collections.abc import Callable

from deltadecode.config import DeltaConfig
from deltadecode.errors import EvaluationError
from deltadecode.evaluation.cells import Cell


def cells_of(name: str, plan: DeltaConfig) -> list[Cell]:
    """The cells of an ablation, full attention first.

    Parameters
    ----------
    name : str
        One of :data:`ABLATIONS`.
    plan : DeltaConfig
        The model's own plan, which everything not under test keeps.

    Returns
    -------
    list of Cell

    Raises
    ------
    EvaluationError
        For an unknown name; the message lists the known.
    """
    if name not in ABLATIONS:
        raise EvaluationError(f"unknown ablation {name!r}; there are {', '.join(ABLATIONS)}")
    return [Cell("full", 0), *ABLATIONS[name](plan)]


def _budget(plan: DeltaConfig) -> int:
    return plan.page_size * plan.budget_pages


def _layers(plan: DeltaConfig) -> list[Cell]:
    """The first 1, 2, ... of the plan's Δ-layers; sparse layers after them read less and older."""
    found = []
    for count in range(1, len(plan.delta_layers) + 1):
        layers = "+".join(map(str, plan.delta_layers[:count])) + ("+" if count == 1 else "")
        found.append(Cell(f"delta:delta_layers={layers}", _budget(plan)))
    return found


def _recent(plan: DeltaConfig) -> list[Cell]:
    """L from 0 to twice the plan's, at half, three quarters and all of its budget."""
    own = plan.recent_pages
    found = []
    for share in (2, 3, 4):
        budget = _budget(plan) * share // 4
        pages = budget // plan.page_size
        values = sorted({0, 1, own // 2, own, 2 * own})
        found += [Cell(f"delta:recent_pages={v}", budget) for v in values if v < pages]
    return found


def _page_size(plan: DeltaConfig) -> list[Cell]:
    """Pages half, twice and four times as large, with as many recent tokens and one budget."""
    found = []
    recent, budget = plan.page_size * plan.recent_pages, _budget(plan)
    for size in (plan.page_size // 2, plan.page_size, 2 * plan.page_size, 4 * plan.page_size):
        pages = -(-recent // size) if size else 0
        if size and budget // size > pages:
            found.append(Cell(f"delta:page_size={size}:recent_pages={pages}", budget))
    return found


def _sinks(plan: DeltaConfig) -> list[Cell]:
    """Without and with the first page, at half the budget and all of it."""
    budgets = (_budget(plan) // 2, _budget(plan))
    return [Cell(f"delta:sink_pages={s}", b) for b in budgets for s in (0, 1)]


def _variants(option: str, *values: object) -> Callable[[DeltaConfig], list[Cell]]:
    def cells(plan: DeltaConfig) -> list[Cell]:
        budgets = (_budget(plan) // 2, _budget(plan))
        return [Cell(f"delta-variant:{option}={value}", b) for b in budgets for value in values]

    return cells


ABLATIONS: dict[str, Callable[[DeltaConfig], list[Cell]]] = {
    "layers": _layers,
    "recent": _recent,
    "page-size": _page_size,
    "heads": _variants("heads", "max", "mean"),
    "reuse": _variants("per_layer", 0, 1),
    "sinks": _sinks,
    "refresh": _variants("refresh", 1, 2, 4, 8),
}
