"""What to run: one cell is a policy with a budget."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltadecode.errors import EvaluationError, PolicyError
from deltadecode.lab.policies import Policy, make_policy, parse_policy
from deltadecode.lab.policies.base import Floats

_UNSAFE = re.compile(r"[^A-Za-z0-9._+=-]+")


@dataclass(frozen=True)
class Cell:
    """A policy with a budget."""

    policy: str  # name and options, as parse_policy reads them
    budget: int  # tokens that a sparse layer may read; 0 for full attention
    fraction: float | None = None  # attended fraction that the budget was solved for

    def make(self, model: Any) -> Policy:
        """The policy, for a model or its configuration."""
        return make_policy(self.policy, model, max(self.budget, 1))

    @property
    def label(self) -> str:
        """Short text for tables and progress."""
        return f"{self.policy} {self.budget}" if self.budget else self.policy


@dataclass(frozen=True)
class Trace:
    """How long the decoding is that a fraction is about: tokens of a prompt, and decode steps."""

    prompt: int  # of a typical sample
    longest_prompt: int
    steps: int

    @property
    def lengths(self) -> Floats:
        """Tokens in the cache at each step, the new one included."""
        return np.arange(self.prompt + 1.0, self.prompt + self.steps + 1)


def make_cells(
    policies: Sequence[str],
    budgets: Sequence[int],
    fractions: Sequence[float],
    model: Any,
    trace: Trace,
    *,
    overhead: bool = False,
) -> list[Cell]:
    """All policies at all budgets (tokens) and attended fractions; every one is checked.

    ``full`` has no budget and comes once. ``overhead`` is as of :func:`solve_budget`. Raises
    PolicyError when a policy is unknown or cannot keep to a budget, EvaluationError when there is
    nothing to run.
    """
    check_policies(policies, budgets, fractions, model)
    cells: list[Cell] = []
    for text in policies:
        if parse_policy(text)[0] == "full":
            cells.append(Cell("full", 0))
            continue
        cells += [Cell(text, budget) for budget in budgets]
        for fraction in fractions:
            budget = solve_budget(text, model, fraction, trace, overhead=overhead)
            cells.append(Cell(text, budget, fraction))
    return check_cells(cells, model, trace)


def check_policies(
    policies: Sequence[str], budgets: Sequence[int], fractions: Sequence[float], config: Any
) -> None:
    """Refuse what cannot be run on any task, by a model's configuration or a model.

    Raises
    ------
    PolicyError, EvaluationError
        As :func:`make_cells`.
    """
    if not policies:
        raise EvaluationError("--policies names no policy")
    for fraction in fractions:
        _check_fraction(fraction)
    for text in policies:
        if parse_policy(text)[0] == "full":
            continue
        if not budgets and not fractions:
            raise EvaluationError(f"policy {text!r} needs --budgets or --attended-fraction")
        for budget in budgets:
            make_policy(text, config, budget)


def check_cells(cells: Iterable[Cell], model: Any, trace: Trace) -> list[Cell]:
    """Make every policy once, so that nothing is refused halfway; each cell once."""
    unique = list(dict.fromkeys(cells))
    for cell in unique:
        cell.make(model).check(trace.longest_prompt)
    return unique


def solve_budget(
    text: str, model: Any, fraction: float, trace: Trace, *, overhead: bool = False
) -> int:
    """The largest budget with which a policy is expected to read no more than a fraction.

    The fraction is tokens read ÷ tokens of full attention, over all steps of the trace and all
    layers; with ``overhead`` also what the policy reads besides keys and values, such as Quest's
    bounds. Where the reads depend on the data (``quest``, ``tidal`` under grouped queries) an upper
    bound of them is taken, so that the policy may read less. Raises PolicyError when the policy
    reads more with any budget that it can keep to.
    """
    _check_fraction(fraction)

    def expected(budget: int) -> float | None:
        try:
            policy = make_policy(text, model, budget)
            policy.check(trace.longest_prompt)
        except PolicyError:
            return None
        lengths = trace.lengths
        other = policy.overhead(lengths).sum() / lengths.sum() if overhead else 0.0
        return expected_fraction(policy, trace) + float(other)

    top = trace.longest_prompt + trace.steps
    least = _bisect(1, top, lambda budget: expected(budget) is not None)
    if least is None:
        make_policy(text, model, top).check(trace.longest_prompt)  # says why
        raise PolicyError(f"policy {text!r} cannot be run with any budget up to {top}")
    lowest = expected(least)
    assert lowest is not None
    if lowest > fraction:
        raise PolicyError(
            f"policy {text!r} cannot read as little as a fraction of {fraction:g}: with its least "
            f"budget of {least} it reads {lowest:.3f} of a prompt of {trace.prompt} tokens and "
            f"{trace.steps} new ones"
        )
    over = _bisect(least, top, lambda budget: (expected(budget) or 0.0) > fraction)
    return top if over is None else over - 1


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise EvaluationError(f"an attended fraction must be between 0 and 1, got {fraction}")


def expected_fraction(policy: Policy, trace: Trace) -> float:
    """Share of full attention's reads that a policy is expected to read; may be an upper bound."""
    lengths = trace.lengths
    return float(policy.expected(lengths, trace.prompt).sum() / lengths.sum())


def _bisect(low: int, high: int, holds: Any) -> int | None:
    """Least number in low..high for which a monotone condition holds; None if it never does."""
    if not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def slug(text: str) -> str:
    """A text as a part of a file name."""
    return _UNSAFE.sub("-", text).strip("-")
