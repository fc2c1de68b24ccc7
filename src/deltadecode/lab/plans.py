"""Which layers read everything, by their places among the full-attention layers.

A plan of F full layers is an ascending tuple of F places that begins with 0: the first D of them
are dense and stand together, the others are Δ-layers, and a sparse layer has the nearest full layer
before it as its source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from deltadecode.errors import CalibrationError

Matrix = NDArray[np.float64]
Places = tuple[int, ...]


def hand_picked(layers: int, count: int, dense: int = 0) -> dict[str, Places]:
    """Plans of a size that a person might write down without measuring, by name.

    ``even`` spreads the Δ-layers evenly, ``early`` puts one behind every sparse layer from the
    start (as long as there is room for it), ``late`` has all but the first at the end, one sparse
    layer after each.
    """
    free, width = count - dense - 1, layers - dense
    even = [dense + round(width * (k + 1) / (count - dense)) for k in range(free)]
    early = [dense + 2 * (k + 1) for k in range(free)]
    late = [layers - 2 * (free - k) for k in range(free)]
    start = tuple(range(dense + 1))
    places = {"even": even, "early": early, "late": late}
    return {
        name: (*start, *rest)
        for name, rest in places.items()
        if all(a < b for a, b in pairwise((*start, *rest, layers)))
    }


def random_plans(layers: int, count: int, dense: int, draws: int, seed: int = 0) -> list[Places]:
    """Distinct plans of a size, each as likely as any other; at most as many as there are."""
    generator = np.random.default_rng(seed)
    most = math.comb(layers - dense - 1, count - dense - 1)
    drawn: dict[Places, None] = {}
    while len(drawn) < min(draws, most):
        rest = generator.choice(np.arange(dense + 1, layers), count - dense - 1, replace=False)
        drawn[(*range(dense + 1), *sorted(map(int, rest)))] = None
    return list(drawn)


def dense_and_delta(full: Places, layers: Sequence[int], dense: int) -> tuple[Places, Places]:
    """Dense and Δ-layers of a plan, from places to the model's layer numbers."""
    numbers = tuple(layers[place] for place in full)
    return numbers[:dense], numbers[dense:]


def leading_dense(full: Places) -> int:
    """Full layers at the start whose next layer is full too: as Δ-layers they select for nobody."""
    return next((n for n, (a, b) in enumerate(pairwise(full)) if b != a + 1), len(full) - 1)


def check_size(layers: int, count: int, dense: int) -> None:
    """Refuse a plan that leaves no layer sparse, with CalibrationError."""
    if count - dense < 1:
        raise CalibrationError(f"a plan needs at least one Δ-layer, got {count - dense}")
    if count >= layers:
        raise CalibrationError(
            f"{dense} dense and {count - dense} Δ-layers leave no sparse layer in a model of "
            f"{layers} full-attention layers; at most {layers - 1} can be full"
        )
