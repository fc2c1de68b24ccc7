"""What a calibration says: one dict for people, files and results."""

from __future__ import annotations

import datetime
import math
from typing import Any

import numpy as np

from deltadecode.architecture import config_hash
from deltadecode.config import DeltaConfig
from deltadecode.lab.calibration.losses import Rows
from deltadecode.lab.calibration.run import CALIBRATED, DEFAULT, Calibration
from deltadecode.lab.collect_env import versions
from deltadecode.lab.policies.base import Floats

Interval = tuple[float, float]


def report(calibration: Calibration) -> dict[str, Any]:
    """Say what was found.

    ``plans`` by name, see :func:`described`, ``layers``, ``texts`` (``fit``, ``held_out``, ``rows``
    of all, ``tokens`` of the shortest and longest), ``measured`` (``[full layers, KL]`` of each
    plan that was measured on every text of the search), ``passes`` and ``seconds``.
    """
    losses, space = calibration.losses, calibration.space
    lengths = [len(piece.ids) for piece in losses.pieces]
    measured = losses.measured(calibration.fit)
    return {
        "plans": {name: described(calibration, cfg) for name, cfg in calibration.plans.items()},
        "layers": list(space.layout.layers),
        "texts": {
            "fit": len(calibration.fit),
            "held_out": len(calibration.held_out),
            "rows": sum(piece.rows for piece in losses.pieces),
            "tokens": [min(lengths), max(lengths)],
        },
        "measured": [[len(space.places(cfg)), rounded(kl)] for cfg, kl in measured.items()],
        "passes": losses.passes,
        "seconds": round(calibration.seconds, 1),
    }


def described(calibration: Calibration, cfg: DeltaConfig) -> dict[str, Any]:
    """A plan's fields, and what it costs.

    ``kl`` (``fit``, ``held_out``) in nats a token; of the held-out texts also ``kl_interval``,
    ``over_default`` (KL less that of the model's own plan) with its interval, ``perplexity_ratio``
    and ``same_top1``; ``attended_fraction``. Intervals are of 95 %, row by row.
    """
    losses, held_out = calibration.losses, calibration.held_out
    rows = Rows.joined([losses.rows(cfg, text) for text in held_out])
    fields = cfg.to_dict()
    result: dict[str, Any] = {
        **fields,
        "kl": {
            # A plan that only the held-out texts have judged has none of the others.
            "fit": rounded(measured) if (measured := _fit(calibration, cfg)) is not None else None,
            "held_out": rounded(losses.kl(cfg, held_out)),
        },
        "kl_interval": interval(rows.kl),
        "perplexity_ratio": rounded(math.exp(rows.lost.mean())),
        "same_top1": rounded(rows.same.mean()),
        "attended_fraction": round(calibration.space.reads(cfg), 5),
    }
    default = calibration.plans.get(DEFAULT)
    if default is not None and default != cfg:
        other = Rows.joined([losses.rows(default, text) for text in held_out])
        result["over_default"] = rounded(float((rows.kl - other.kl).mean()))
        result["over_default_interval"] = interval(rows.kl - other.kl)
    return result


def _fit(calibration: Calibration, cfg: DeltaConfig) -> float | None:
    return calibration.losses.measured(calibration.fit).get(cfg)


def interval(values: Floats) -> Interval:
    """95 % of the mean, as if rows were independent."""
    half = 1.96 * values.std() / math.sqrt(len(values))
    return rounded(values.mean() - half), rounded(values.mean() + half)


def rounded(value: float | np.floating[Any]) -> float:
    """Four digits that count."""
    return float(f"{value:.4g}")


def plan_file(
    report: dict[str, Any], model: Any, name: str, data: str, command: str
) -> tuple[DeltaConfig, dict[str, Any]]:
    """The calibrated plan and its ``meta``, for :meth:`DeltaConfig.save`.

    ``meta`` holds title, source, model, config_hash, data, date, versions, expected (of held-out
    texts) and all plans that were judged.
    """
    ours = report["plans"][CALIBRATED]
    meta = {
        "title": f"calibrated for {name}",
        "source": command,
        "model": name,
        "config_hash": config_hash(model),
        "data": data,
        "texts": report["texts"],
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "versions": versions(),
        "expected": {
            "kl": ours["kl"]["held_out"],
            **{name: ours[name] for name in ("perplexity_ratio", "same_top1", "attended_fraction")},
        },
        "plans": report["plans"],
    }
    fields = [key for key in DeltaConfig().to_dict() if key in ours]
    return DeltaConfig.from_dict({key: ours[key] for key in fields}), meta
