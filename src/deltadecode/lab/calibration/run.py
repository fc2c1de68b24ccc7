"""A calibration from texts to a plan: search on some texts, choose on others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deltadecode.config import DeltaConfig
from deltadecode.errors import CalibrationError
from deltadecode.lab.calibration.losses import Losses, OutOfTime
from deltadecode.lab.calibration.search import search
from deltadecode.lab.calibration.space import Request, Space
from deltadecode.lab.calibration.texts import Piece
from deltadecode.lab.policies.base import Floats

CALIBRATED, DEFAULT, EVEN = "calibrated", "default", "even spread"
# Told what runs, the share of the time that is over, and the seconds left at most.
Progress = Callable[[str, float, float], None]
FOUND = 3  # plans of a search that the other texts judge
_STEPS = 5  # attended fractions that are tried for a KL
_MOST = 0.9  # of them


@dataclass(eq=False)
class Calibration:
    """What a calibration found; texts are numbers of the pieces."""

    losses: Losses
    space: Space  # with the attended fraction that was chosen for a KL
    fit: list[int]
    held_out: list[int]
    # The plans that the held-out texts judged, by name; the calibrated one first.
    plans: dict[str, DeltaConfig] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def chosen(self) -> DeltaConfig:
        """The calibrated plan."""
        return self.plans[CALIBRATED]


def split(texts: int) -> tuple[list[int], list[int]]:
    """Texts to search on, and those to judge by: every third, or the last of two."""
    if texts < 2:
        raise CalibrationError(
            f"calibration needs at least 2 texts, one to fit and one to judge, got {texts}"
        )
    held_out = list(range(2, texts, 3)) or [texts - 1]
    return [text for text in range(texts) if text not in held_out], held_out


def calibrate(
    model: Any, pieces: Sequence[Piece], request: Request, lengths: Floats, *, minutes: float,
    seed: int = 0, state: Path | None = None, progress: Progress = lambda label, done, left: None,
) -> Calibration:  # fmt: skip
    """Find a plan in a given time.

    ``lengths`` are the tokens n at which the attended fraction is counted. Of the plans that fit
    what is asked, the model's own layers at equal reads are always among those judged, so that the
    result never loses more than they do on the held-out texts. Raises CalibrationError when no plan
    is what was asked for.
    """
    start = time.monotonic()
    end = start + 60 * minutes
    fit, held_out = split(len(pieces))
    first = replace(request, kl=None, fraction=_MOST) if request.kl is not None else request
    space = Space(model, first, lengths)
    losses = Losses(model, space, pieces, state)

    def show(label: str) -> None:
        left = max(end - time.monotonic(), 0.0)
        progress(label, 1 - left / (60 * minutes) if minutes else 1.0, left)

    losses.progress = show
    losses.reserve = lambda: (
        1.2 * len(held_out) * (losses.prepare_seconds + 2 * (FOUND + 2) * losses.pass_seconds)
    )
    losses.until = end
    if request.kl is None:
        search(losses, space, fit, seed)
        found = [Calibration(losses, space, fit, held_out)]
    else:
        found = _spaces(model, losses, request, lengths, fit, held_out, seed)
    for calibration in found:
        _name(calibration)
    losses.release()
    losses.reserve = lambda: 0.0
    for calibration in found:
        _judge(calibration)
        reached = losses.kl(calibration.chosen, held_out)
        if request.kl is None or reached <= request.kl:
            calibration.seconds = time.monotonic() - start
            return calibration
    raise CalibrationError(
        f"no plan was found that keeps a KL of {request.kl:g} on held-out texts; the least is "
        f"{reached:.3g}, with {calibration.space.reads(calibration.chosen):.0%} of the reads"
    )


def _spaces(
    model: Any, losses: Losses, request: Request, lengths: Floats, fit: list[int],
    held_out: list[int], seed: int,
) -> list[Calibration]:  # fmt: skip
    """The attended fractions whose best plan keeps the KL on the fitted texts, the least first.

    By bisection; the largest is among them whatever it loses.
    """
    assert request.kl is not None
    low, high = 0.0, 2 * _MOST
    found: list[Calibration] = []
    end = losses.until
    for step in range(_STEPS):
        fraction = (low + high) / 2
        now = time.monotonic()
        losses.until = now + (end - now) / (_STEPS - step)
        try:
            space = Space(model, replace(request, kl=None, fraction=fraction), lengths)
        except CalibrationError:
            low = fraction
            continue
        known = [space.places(c) for done in found for c in losses.measured(fit) if done][:8]
        search(losses, space, fit, seed, list(dict.fromkeys(known)))
        best = _best(losses, space, fit)
        here = Calibration(losses, space, fit, held_out)
        if best is None or losses.kl(best, fit) > request.kl:
            low = fraction
            found = found or [here]
        else:
            high = fraction
            found.insert(0, here)
    losses.until = end
    return found


def _best(losses: Losses, space: Space, texts: Sequence[int]) -> DeltaConfig | None:
    return next((cfg for cfg in losses.measured(texts) if _fits(space, cfg)), None)


def _fits(space: Space, cfg: DeltaConfig) -> bool:
    """Whether a plan is one of the space: K solved for its fraction, or as given."""
    full = space.places(cfg)
    return len(full) in space.counts and space.solved(full, cfg.recent_pages, cfg.sink_pages) == cfg


def _name(calibration: Calibration) -> None:
    """Name the plans to judge: the model's own, the best that were found, and an even spread."""
    losses, space, fit = calibration.losses, calibration.space, calibration.fit
    spreads = space.spreads()
    ranked = [cfg for cfg in losses.measured(fit) if _fits(space, cfg)]
    even = next((cfg for cfg in ranked if cfg in spreads), None)
    if even is None and spreads:
        even = spreads[len(spreads) // 2]
    wanted = {DEFAULT: space.default(), "found 1": next(iter(ranked), None), EVEN: even}
    wanted.update({f"found {n}": cfg for n, cfg in enumerate(ranked[:FOUND], 1)})
    calibration.plans = {name: cfg for name, cfg in wanted.items() if cfg is not None}
    if not calibration.plans:
        raise CalibrationError("no plan is what was asked for")
    try:
        for cfg in calibration.plans.values():
            losses.kl(cfg, fit)
    except OutOfTime:
        return


def _judge(calibration: Calibration) -> None:
    """Choose the plan of least KL on all texts; on those held out it may not be behind the default.

    Two plans are judged whatever the time.
    """
    losses, held_out = calibration.losses, calibration.held_out
    until, losses.until = losses.until, float("inf")
    judged: dict[str, DeltaConfig] = {}
    try:
        for name, cfg in calibration.plans.items():
            losses.say(f"judging {name}")
            losses.kl(cfg, held_out)
            judged[name] = cfg
            if len(judged) > 1:
                losses.until = until
    except OutOfTime:
        pass
    losses.until = until
    everything = losses.measured([*calibration.fit, *held_out])
    bar = losses.kl(judged[DEFAULT], held_out) if DEFAULT in judged else float("inf")
    known = [
        cfg for cfg in everything if cfg in judged.values() and losses.kl(cfg, held_out) <= bar
    ]
    # Without time for the fitted texts, those held out must do.
    chosen = known[0] if known else min(judged.values(), key=lambda cfg: losses.kl(cfg, held_out))
    others = {name: cfg for name, cfg in judged.items() if name in (DEFAULT, EVEN) or cfg != chosen}
    calibration.plans = {CALIBRATED: chosen, **others}
