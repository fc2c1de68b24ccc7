"""Ablations of DELTA: its own choices, changed one at a time (arXiv 2510.09883, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deltadecode.config import DeltaConfig
from deltadecode.errors import EvaluationError
from deltadecode.lab.evaluation.cells import Cell
from deltadecode.lab.plans import dense_and_delta, hand_picked, random_plans
from deltadecode.lab.policies import parse_policy

RANDOM_PLANS = 5
_PAGES = ("page_size", "recent_pages", "sink_pages")
# What options of ``delta-variant`` are in DELTA.
_UNCHANGED = {"heads": "max", "per_layer": 0, "refresh": 1, "accumulate": 0}


def cells_of(
    name: str,
    plan: DeltaConfig,
    layers: Sequence[int] = (),
    measured: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Cell]:
    """The cells of an ablation, full attention first; ``plan`` is what everything else keeps.

    Only ``plans`` needs ``layers``, the model's full-attention layers, and ``measured``: what a
    calibration found, by name, ours first, each with ``dense_layers`` and ``delta_layers``, and
    with page settings where they are not the model's own. Raises EvaluationError for an unknown
    name, or for ``plans`` without a calibration.
    """
    if name == PLANS:
        cells = _plans(plan, layers, measured or {})
    elif name in ABLATIONS:
        cells = ABLATIONS[name](plan)
    else:
        known = ", ".join([*ABLATIONS, PLANS])
        raise EvaluationError(f"unknown ablation {name!r}; there are {known}")
    return [Cell("full", 0), *(_plain(cell, plan) for cell in cells)]


def _plain(cell: Cell, plan: DeltaConfig) -> Cell:
    """``delta`` in place of a cell that changes nothing, so that ablations share its samples."""
    options = parse_policy(cell.policy)[1]
    if all(value == getattr(plan, key, _UNCHANGED.get(key)) for key, value in options.items()):
        return Cell("delta", cell.budget)
    return cell


def _budget(plan: DeltaConfig) -> int:
    return plan.page_size * plan.budget_pages


def _layers(plan: DeltaConfig) -> list[Cell]:
    """The first 1, 2, ... of the plan's Δ-layers; sparse layers after them read less and older."""
    cells = []
    for count in range(1, len(plan.delta_layers) + 1):
        layers = _layer_list(plan.delta_layers[:count])
        cells.append(Cell(f"delta:delta_layers={layers}", _budget(plan)))
    return cells


def _plans(
    plan: DeltaConfig, layers: Sequence[int], measured: Mapping[str, Mapping[str, Any]]
) -> list[Cell]:
    """Measured plans, the model's own, hand-picked and random ones: one size, K and L for all."""
    if not measured:
        raise EvaluationError(
            "ablation 'plans' needs the plans of a calibration; give the file that deltadecode "
            "calibrate -o wrote with --plan"
        )
    for name, fitted in measured.items():
        if not {"dense_layers", "delta_layers"} <= set(fitted):
            raise EvaluationError(f"plan {name!r} of the calibration lacks dense_ or delta_layers")
    first = next(iter(measured.values()))
    pages = {key: first.get(key, getattr(plan, key)) for key in (*_PAGES, "budget_pages")}
    changed = "".join(f"{k}={pages[k]}:" for k in _PAGES if pages[k] != getattr(plan, k))
    chosen = [
        (tuple(fitted["dense_layers"]), tuple(fitted["delta_layers"]))
        for fitted in measured.values()
    ]
    dense, count = len(chosen[0][0]), len(chosen[0][0]) + len(chosen[0][1])
    own = tuple(plan.dense_layers), tuple(plan.delta_layers)
    if len(own[0]) + len(own[1]) == count:
        chosen.append(own)
    for full in (
        *hand_picked(len(layers), count, dense).values(),
        *random_plans(len(layers), count, dense, RANDOM_PLANS),
    ):
        chosen.append(dense_and_delta(full, layers, dense))
    budget = pages["budget_pages"] * pages["page_size"]
    return [
        Cell(f"delta:{changed}{'' if a == own[0] else f'dense_layers={_layer_list(a)}:'}"
             f"delta_layers={_layer_list(b)}", budget)
        for a, b in chosen
    ]  # fmt: skip


def _layer_list(layers: Sequence[int]) -> str:
    """As :func:`deltadecode.lab.policies.parse_policy` reads it."""
    return "+".join(map(str, layers)) + ("+" if len(layers) < 2 else "")


def _recent(plan: DeltaConfig) -> list[Cell]:
    """L from 0 to twice the plan's, at half, three quarters and all of its budget."""
    own = plan.recent_pages
    cells = []
    for share in (2, 3, 4):
        budget = _budget(plan) * share // 4
        pages = budget // plan.page_size
        values = sorted({0, 1, own // 2, own, 2 * own})
        cells += [Cell(f"delta:recent_pages={v}", budget) for v in values if v < pages]
    return cells


def _page_size(plan: DeltaConfig) -> list[Cell]:
    """Pages half, twice and four times as large, with as many recent tokens and one budget."""
    cells = []
    recent, budget = plan.page_size * plan.recent_pages, _budget(plan)
    for size in (plan.page_size // 2, plan.page_size, 2 * plan.page_size, 4 * plan.page_size):
        pages = -(-recent // size) if size else 0
        if size and budget // size > pages:
            cells.append(Cell(f"delta:page_size={size}:recent_pages={pages}", budget))
    return cells


def _sinks(plan: DeltaConfig) -> list[Cell]:
    """Without and with the first page, at half the budget and all of it."""
    budgets = (_budget(plan) // 2, _budget(plan))
    return [Cell(f"delta:sink_pages={s}", b) for b in budgets for s in (0, 1)]


def _variants(option: str, *values: object) -> Callable[[DeltaConfig], list[Cell]]:
    def cells(plan: DeltaConfig) -> list[Cell]:
        budgets = (_budget(plan) // 2, _budget(plan))
        return [Cell(f"delta-variant:{option}={value}", b) for b in budgets for value in values]

    return cells


PLANS = "plans"
ABLATIONS: dict[str, Callable[[DeltaConfig], list[Cell]]] = {
    "layers": _layers,
    "recent": _recent,
    "page-size": _page_size,
    "heads": _variants("heads", "max", "mean", "rms", "two", "kv"),
    "accumulate": _variants("accumulate", 0, 0.25, 0.5, 1),
    "reuse": _variants("per_layer", 0, 1),
    "sinks": _sinks,
    "refresh": _variants("refresh", 1, 2, 4, 8),
}
