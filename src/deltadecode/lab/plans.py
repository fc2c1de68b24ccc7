"""Which layers read everything: the plan that captures most, and the paper's.

Layers are counted by their place among the full-attention layers. A plan of F full layers is an
ascending tuple of F places that begins with 0: the first D of them are dense and stand together,
the others are Δ-layers, and a sparse layer j has the nearest full layer before it as its source. Of
its attention it keeps R[source, j].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from deltadecode.errors import CalibrationError

Matrix = NDArray[np.float64]
Places = tuple[int, ...]


def losses(r: Matrix, need: Matrix | None = None) -> Matrix:
    """What a sparse layer j loses with source i: w_j (1 - R[i, j]), scaled so that w sums to 1.

    ``r`` [layers, layers] is of :class:`deltadecode.lab.attention_statistics.Captured`, ``need``
    [layers] is w of :class:`deltadecode.lab.calibration.need.Need`; by default all are alike.
    """
    weights = np.ones(len(r)) if need is None else np.asarray(need, dtype=np.float64)
    loss: Matrix = weights / weights.sum() * (1.0 - r)
    return loss


def sources(layers: int, full: Places) -> dict[int, int]:
    """The source of each sparse layer: the nearest full layer before it."""
    ends = (*full[1:], layers)
    return {j: i for i, end in zip(full, ends, strict=True) for j in range(i + 1, end)}


def kept(loss: Matrix, full: Places) -> float:
    """Share of all layers' attention that a plan keeps, by :func:`losses`; full layers keep all."""
    return 1.0 - math.fsum(loss[i, j] for j, i in sources(len(loss), full).items())


def recall(r: Matrix, full: Places) -> float:
    """Mean of R[source, j] over the sparse layers; 1 for a plan without any."""
    shares = [float(r[i, j]) for j, i in sources(len(r), full).items()]
    return math.fsum(shares) / len(shares) if shares else 1.0


def best_plan(loss: Matrix, count: int, dense: int = 0) -> Places:
    """The plan of F = ``count`` full layers that keeps most, by dynamic programming.

    With g(i, k) = Σ_{i<j<k} loss[i, j], what the layers between full layers i and k lose, the least
    that the layers before i lose with i as the m-th full layer is
    V(m, i) = min_{h<i} V(m-1, h) + g(h, i), and the plan ends with the i of the least
    V(F, i) + g(i, layers). Exact, in F · layers² steps. Places 0 to D = ``dense`` are full, the
    last of them as the first Δ-layer. Ties go to the lower places. Raises CalibrationError when no
    sparse layer would be left.
    """
    layers = len(loss)
    check_size(layers, count, dense)
    between = _between(loss)
    # value[i]: least with i as the latest full layer; back[m][i]: the full layer before it.
    value = np.full(layers, np.inf)
    value[dense] = 0.0
    back = []
    for _ in range(count - dense - 1):
        through = value[:, None] + between[:, :layers]
        back.append(through.argmin(axis=0))
        value = through.min(axis=0)
    places = [int((value + between[:, layers]).argmin())]
    for before in reversed(back):
        places.append(int(before[places[-1]]))
    return (*range(dense), *reversed(places))


def _between(loss: Matrix) -> Matrix:
    """g(i, k) [layers, layers + 1]; inf for k ≤ i."""
    layers = len(loss)
    place = np.arange(layers)
    upper = np.where(place[None] > place[:, None], loss, 0.0)
    sums = np.concatenate([np.zeros((layers, 1)), upper.cumsum(axis=1)], axis=1)
    between: Matrix = np.where(np.arange(layers + 1)[None] > place[:, None], sums, np.inf)
    return between


def paper_plan(shift: Sequence[float] | Matrix, count: int, dense: int = 0) -> Places:
    """The paper's way as a rule: peaks of the shift, spread over depth (arXiv 2510.09883).

    The layer behind the dense ones is the first Δ-layer, since every sparse layer needs one. The
    layers behind it but the last, which would select for nobody, are cut into as many runs of equal
    length as there are Δ-layers left to place (the first runs are one longer where it does not come
    out even); each run gives the layer into which the shift is largest, ties the lower one. The
    authors' own plans keep to such runs: 2 14 22 of 28 layers, 2 6 42 of 48. Raises
    CalibrationError when no sparse layer would be left.
    """
    check_size(len(shift), count, dense)
    runs = np.array_split(np.arange(dense + 1, len(shift) - 1), max(count - dense - 1, 1))
    if count - dense - 1 > len(shift) - 2 - dense:
        # As many as there are places: the last layer must do, too.
        return tuple(range(count))
    values = np.asarray(shift)
    peaks = [int(run[values[run].argmax()]) for run in runs[: count - dense - 1]]
    return (*range(dense + 1), *peaks)


def all_plans(layers: int, count: int, dense: int = 0) -> Iterator[Places]:
    """Every plan of a size, for checks; there are (layers - D - 1) over (F - D - 1) of them."""
    for rest in combinations(range(dense + 1, layers), count - dense - 1):
        yield (*range(dense + 1), *rest)


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
