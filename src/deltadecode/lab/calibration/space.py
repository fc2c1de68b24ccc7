"""What a calibration may try: plans of the reads that are asked for, and how to change them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from deltadecode.architecture import num_layers, text_config
from deltadecode.config import DeltaConfig
from deltadecode.errors import CalibrationError
from deltadecode.lab import plans
from deltadecode.lab.plans import Places
from deltadecode.lab.policies.base import Floats, Layout
from deltadecode.lab.policies.delta import Delta

# L and S that are tried; L in tokens, so that pages of every size have as much.
RECENT_TOKENS = (64, 128, 192)
SINK_PAGES = (0, 1, 2)
NEAR = 3  # places that a Δ-layer may move in one exchange of the first kind


@dataclass(frozen=True)
class Request:
    """The plan that is asked for.

    ``base`` is the model's own plan, with what was typed in its place; fields named in ``fixed``
    (``recent_pages``, ``sink_pages``) are taken from it, not chosen. For a ``fraction`` (attended)
    K is solved. ``deltas`` gives the number of Δ-layers behind ``dense`` dense ones; without it
    both numbers are chosen. ``kl``, in nats a token, asks for the least reads that keep to it.
    """

    base: DeltaConfig
    deltas: int | None = None
    dense: int | None = None
    fraction: float | None = None
    kl: float | None = None
    fixed: frozenset[str] = frozenset()

    def check(self, layers: int) -> None:
        """Refuse what cannot be, for a model of so many full-attention layers."""
        if self.kl is not None and (self.deltas is not None or self.fraction is not None):
            raise CalibrationError(
                "a KL decides what the plan reads; give neither a number of Δ-layers nor an "
                "attended fraction with it"
            )
        if self.kl is not None and self.kl <= 0:
            raise CalibrationError(f"the KL must be above 0, got {self.kl:g}")
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise CalibrationError(
                f"the attended fraction must be between 0 and 1, got {self.fraction:g}"
            )
        dense = self.dense or 0
        plans.check_size(layers, dense + (self.deltas or 1), dense)


def asked(model: Any, request: Request, lengths: Floats) -> Request:
    """The request; one that asks for no size, with the reads of the model's own plan."""
    if (request.deltas, request.fraction, request.kl) != (None, None, None):
        return request
    policy = _policy(Layout.of(model), num_layers(text_config(model)), request.base)
    fraction = _reads(policy, lengths)
    if fraction >= 1:
        raise CalibrationError(
            f"the model's own plan reads everything at {lengths.mean():.0f} tokens; ask for an "
            "attended fraction, or measure longer texts"
        )
    return replace(request, fraction=fraction)


def _policy(layout: Layout, depth: int, cfg: DeltaConfig) -> Delta:
    plan = cfg.layer_plan(depth, layout.layers)
    return Delta(layout, cfg.budget_pages * cfg.page_size, cfg, plan)


def _reads(policy: Delta, lengths: Floats) -> float:
    return float(policy.expected(lengths, 0).sum() / lengths.sum())


class Space:
    """Plans of what is asked, for one model; ``lengths`` are the tokens n at the decode steps.

    A plan is a :class:`DeltaConfig`. Places count the full-attention layers from 0.
    """

    def __init__(self, model: Any, request: Request, lengths: Floats) -> None:
        self.layout, self.depth = Layout.of(model), num_layers(text_config(model))
        # Without a budget that grows: K is what is chosen.
        self.base = replace(request.base, budget_share=0.0)
        self.request, self.lengths = request, lengths
        self.layers = len(self.layout.layers)
        self._pages: dict[tuple[int, int, int], int | None] = {}
        request.check(self.layers)
        # Places 0 to first are full: every sparse layer needs a Δ-layer before it.
        self.first = 0 if request.deltas is None else self._dense()
        size, base = self.base.page_size, self.base
        recents = {base.recent_pages, *(max(tokens // size, 1) for tokens in RECENT_TOKENS)}
        self.recents = [base.recent_pages] if "recent_pages" in request.fixed else sorted(recents)
        self.sinks = [base.sink_pages] if "sink_pages" in request.fixed else list(SINK_PAGES)
        wished = range(1, self.layers)
        if request.deltas is not None:
            wished = range(self.first + request.deltas, self.first + request.deltas + 1)
        self.counts = [count for count in wished if self._any_pages(count)]
        if not self.counts:
            raise CalibrationError(
                f"no plan reads as little as a fraction of {request.fraction:g} of "
                f"{lengths.mean():.0f} tokens; the least is {self._least(wished):.3f}"
            )

    def _dense(self) -> int:
        dense = self.request.dense
        return len(self.base.dense_layers) if dense is None else dense

    def _any_pages(self, count: int) -> bool:
        return self.pages(count, min(self.recents), min(self.sinks)) is not None

    def _least(self, counts: range) -> float:
        recent, sink = min(self.recents), min(self.sinks)
        return min(self._reads_of(count, recent + sink + 1, recent, sink) for count in counts)

    def plan(self, full: Places, recent: int, sink: int, pages: int) -> DeltaConfig:
        """The plan of some full layers, by place, and of K, L and S."""
        dense = plans.leading_dense(full) if self.request.deltas is None else self.first
        dense_layers, delta_layers = plans.dense_and_delta(full, self.layout.layers, dense)
        return replace(
            self.base, budget_pages=pages, recent_pages=recent, sink_pages=sink,
            dense_layers=dense_layers, delta_layers=delta_layers,
        )  # fmt: skip

    def solved(self, full: Places, recent: int, sink: int) -> DeltaConfig | None:
        """The same with the K that is asked for; None where there is none."""
        pages = self.pages(len(full), recent, sink)
        return None if pages is None else self.plan(full, recent, sink, pages)

    def places(self, cfg: DeltaConfig) -> Places:
        """Places of a plan's full layers."""
        numbers = (*cfg.dense_layers, *cfg.delta_layers)
        return tuple(self.layout.layers.index(layer) for layer in numbers)

    def policy(self, cfg: DeltaConfig) -> Delta:
        """The plan as a policy."""
        return _policy(self.layout, self.depth, cfg)

    def reads(self, cfg: DeltaConfig) -> float:
        """Attended fraction of a plan at the lengths."""
        return _reads(self.policy(cfg), self.lengths)

    def _reads_of(self, count: int, pages: int, recent: int, sink: int) -> float:
        return self.reads(self.plan(tuple(range(count)), recent, sink, pages))

    def pages(self, count: int, recent: int, sink: int) -> int | None:
        """The K of a plan with so many full layers; None where it would break a rule.

        For an attended fraction it is the largest that reads no more.
        """
        key = count, recent, sink
        if key not in self._pages:
            self._pages[key] = self._solve(count, recent, sink)
        return self._pages[key]

    def _solve(self, count: int, recent: int, sink: int) -> int | None:
        least, fraction = recent + sink + 1, self.request.fraction
        if fraction is None:
            return self.base.budget_pages if self.base.budget_pages >= least else None
        if self._reads_of(count, least, recent, sink) > fraction:
            return None
        low, high = least, max(int(self.lengths.max()) // self.base.page_size + 1, least) + 1
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._reads_of(count, middle, recent, sink) <= fraction
            low, high = (middle, high) if fits else (low, middle)
        return low

    def default(self) -> DeltaConfig | None:
        """The model's own layers, L and S, at the reads that are asked for.

        None where it cannot read so little, or another number of Δ-layers is asked for.
        """
        base, request = self.base, self.request
        size = self._dense(), request.deltas
        if request.deltas is not None and size != (len(base.dense_layers), len(base.delta_layers)):
            return None
        pages = self.pages(len(self.places(base)), base.recent_pages, base.sink_pages)
        return None if pages is None else replace(base, budget_pages=pages)

    def spreads(self) -> list[DeltaConfig]:
        """Even spreads of every size behind up to two dense layers, with the L and S of the base.

        S is 1 where the base has none and it may be chosen: a guess that anyone can make.
        """
        base = self.base
        sink = base.sink_pages or (1 if 1 in self.sinks else 0)
        wanted = range(self.first, self.first + 1) if self.request.deltas is not None else range(3)
        found = []
        for count in self.counts:
            for dense in wanted:
                even = plans.hand_picked(self.layers, count, dense).get("even")
                if count > dense and even is not None:
                    found.append(self.solved(even, base.recent_pages, sink))
        return list(dict.fromkeys(cfg for cfg in found if cfg is not None))

    def near(self, cfg: DeltaConfig) -> Iterator[DeltaConfig]:
        """Plans one small step away: a Δ-layer moved, added or taken out, or another L or S."""
        full = self.places(cfg)
        recent, sink = cfg.recent_pages, cfg.sink_pages
        free = [place for place in range(self.first + 1, self.layers) if place not in full]
        moves = [_moved(full, old, new) for old in full for new in free if abs(old - new) <= NEAR]
        moves += [tuple(sorted((*full, new))) for new in free]
        moves += [tuple(place for place in full if place != old) for old in full]
        yield from self._kept(moves, recent, sink)
        for other in self.recents:
            yield from self._kept([full], other, sink)
        for other in self.sinks:
            yield from self._kept([full], recent, other)

    def far(self, cfg: DeltaConfig) -> Iterator[DeltaConfig]:
        """Plans with one Δ-layer anywhere else."""
        full = self.places(cfg)
        free = [place for place in range(self.first + 1, self.layers) if place not in full]
        moves = [_moved(full, old, new) for old in full for new in free if abs(old - new) > NEAR]
        yield from self._kept(moves, cfg.recent_pages, cfg.sink_pages)

    def _kept(self, moves: list[Places], recent: int, sink: int) -> Iterator[DeltaConfig]:
        start = tuple(range(self.first + 1))
        for full in moves:
            if len(full) in self.counts and full[: len(start)] == start:
                cfg = self.solved(full, recent, sink)
                if cfg is not None:
                    yield cfg


def _moved(full: Places, old: int, new: int) -> Places:
    return tuple(sorted((*(place for place in full if place != old), new)))
