"""The search: layers leave until few are full, then exchanges as long as something is gained.

Everything is measured on the same rows, so plans are compared pairwise, row by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from deltadecode.config import DeltaConfig
from deltadecode.lab.calibration.losses import Losses, OutOfTime
from deltadecode.lab.calibration.space import Space
from deltadecode.lab.plans import Places

STARTS = 3  # plans that exchanges begin at
_MEASURED_STARTS = 8
_HEADS = 8  # texts whose first rows rank plans before exchanges
_GAIN = 0.005  # of the KL, that an exchange must bring: less is the texts' chance
_ROUNDING = 1e-8  # nats; what float32 makes of no difference


def search(
    losses: Losses, space: Space, texts: Sequence[int], seed: int, known: Iterable[Places] = ()
) -> None:
    """Measure plans on some texts until no exchange helps, or the time is over.

    It begins at the model's own plan, at even spreads, and at ``known`` full layers or, without
    them, those that elimination leaves. What was found is in :meth:`Losses.measured`.
    """
    few = losses.heads(texts[:_HEADS])
    default = space.default()
    begin = [*([] if default is None else [default]), *space.spreads()]
    try:
        for cfg in begin:
            losses.kl(cfg, few)
        places = list(known) or _eliminated(losses, space, few)
        solved = (space.solved(full, space.base.recent_pages, _sink(space)) for full in places)
        begin += [cfg for cfg in solved if cfg is not None]
        starts = sorted(dict.fromkeys(begin), key=lambda cfg: losses.kl(cfg, few))
        best = sorted(starts[:_MEASURED_STARTS], key=lambda cfg: losses.kl(cfg, texts))
        generator = np.random.default_rng(seed)
        for start in best[:STARTS]:
            exchange(losses, space, texts, start, generator)
    except OutOfTime:
        return


def _eliminated(losses: Losses, space: Space, texts: Sequence[int]) -> list[Places]:
    """What elimination leaves in half of the time that is left; nothing if that is too short."""
    until = losses.until
    losses.until -= losses.left() / 2
    try:
        return list(eliminate(losses, space, texts).values())
    except OutOfTime:
        return []
    finally:
        losses.until = until


def eliminate(losses: Losses, space: Space, texts: Sequence[int]) -> dict[int, Places]:
    """Full layers by how many are left, when the one that costs least leaves each time.

    It begins with every layer full. What the leaving of a layer cost before is taken as a bound of
    what it costs now, so that few are measured anew (lazy greedy). When time is over, what is known
    decides, if every layer was measured once. Only numbers of full layers that the space has are
    returned. K is that of the middle number.
    """
    recent, sink = space.base.recent_pages, _sink(space)
    middle = space.counts[len(space.counts) // 2 :] + space.counts[::-1]
    pages = next((k for n in middle if (k := space.pages(n, recent, sink)) is not None), None)
    if pages is None:
        return {}

    def kl(full: Places) -> float:
        return losses.kl(space.plan(full, recent, sink, pages), texts)

    full, now = tuple(range(space.layers)), 0.0
    cost = dict.fromkeys(full[space.first + 1 :], -1.0)
    found: dict[int, Places] = {}
    while len(full) > min(space.counts):
        losses.say(f"{len(full)} full layers")
        checked: set[int] = set()
        try:
            while (place := min(cost, key=lambda place: cost[place])) not in checked:
                cost[place] = kl(_without(full, place)) - now
                checked.add(place)
        except OutOfTime:
            if min(cost.values()) == -1.0:
                raise
        full, now = _without(full, place), now + cost.pop(place)
        if len(full) in space.counts:
            found[len(full)] = full
    return found


def exchange(
    losses: Losses, space: Space, texts: Sequence[int], best: DeltaConfig,
    generator: np.random.Generator,
) -> DeltaConfig:  # fmt: skip
    """Take the first exchange that helps, again and again; small ones before large ones."""
    improved = True
    while improved:
        losses.say(f"KL {losses.kl(best, texts):.4f}")
        improved = False
        for kind in (space.near, space.far):
            others = list(dict.fromkeys(kind(best)))
            for number in generator.permutation(len(others)):
                # In a new order each time: no text alone decides what goes on.
                order = [texts[place] for place in generator.permutation(len(texts))]
                if beats(losses, others[number], best, order):
                    best, improved = others[number], True
                    break
            if improved:
                break
    return best


def beats(losses: Losses, new: DeltaConfig, old: DeltaConfig, texts: Sequence[int]) -> bool:
    """Whether a plan has less KL than another; text by text, until there is no hope of it.

    It gives up where the mean difference so far is above its standard error.
    """
    parts: list[np.ndarray] = []
    for text in texts:
        parts.append(losses.rows(new, text).kl - losses.rows(old, text).kl)
        values = np.concatenate(parts)
        if values.mean() > values.std() / np.sqrt(len(values)):
            return False
    gain = -np.mean([part.mean() for part in parts])
    return bool(gain > _GAIN * losses.kl(old, texts) + _ROUNDING)


def _without(full: Places, place: int) -> Places:
    return tuple(other for other in full if other != place)


def _sink(space: Space) -> int:
    base = space.base.sink_pages
    return base if base or 1 not in space.sinks else 1
