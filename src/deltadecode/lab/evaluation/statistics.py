"""Intervals of accuracies and of paired differences. Needs SciPy."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltadecode.errors import EvaluationError

_RESAMPLES = 10_000
_SEED = 0


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def can_report() -> bool:
    """Whether SciPy and matplotlib are installed, which runs do not need but reports do."""
    return all(importlib.util.find_spec(name) is not None for name in ("scipy", "matplotlib"))


def check_installed() -> None:
    """Refuse to report without SciPy and matplotlib."""
    if not can_report():
        raise EvaluationError(
            "intervals need SciPy and figures matplotlib: pip install 'deltadecode[lab]'"
        )


def mean_interval(values: NDArray[np.float64]) -> Interval:
    """Mean of scores [samples].

    If all are 0 or 1, the interval is Wilson's, which is sound where all are equal; else it is from
    the bootstrap.
    """
    from scipy import stats

    if set(np.unique(values)) <= {0.0, 1.0}:
        interval = stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
        return Interval(float(values.mean()), float(interval.low), float(interval.high))
    return _bootstrap(values)


def paired_difference(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> Interval:
    """Mean of ours - theirs over the same samples [samples], from the paired bootstrap.

    The interval is of percentiles of 10,000 resamples, from one seed. Without any difference it is
    [0, 0], which is no proof that there is none.
    """
    if ours.shape != theirs.shape:
        raise EvaluationError(f"the samples must be the same, got {ours.shape} and {theirs.shape}")
    return _bootstrap(ours - theirs)


def _bootstrap(values: NDArray[np.float64]) -> Interval:
    from scipy import stats

    mean = float(values.mean())
    if len(values) < 2 or np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    interval = stats.bootstrap(
        (values,), np.mean, n_resamples=_RESAMPLES, method="percentile", batch=1000,
        random_state=np.random.default_rng(_SEED),
    ).confidence_interval  # fmt: skip
    return Interval(mean, float(interval.low), float(interval.high))
