"""What a calibration says: one dict for people, files and results."""

from __future__ import annotations

import datetime
import math
from typing import Any

from deltadecode.architecture import config_hash
from deltadecode.config import DeltaConfig
from deltadecode.lab import plans
from deltadecode.lab.calibration.fit import Candidate, Measurement, described, fitted, offered
from deltadecode.lab.collect_env import versions

CALIBRATED = "calibrated"
RANDOM_PLANS = 8
_EXHAUSTIVE = 200_000  # plans that are counted out in seconds


def report(measurement: Measurement) -> dict[str, Any]:
    """Fit the plans and say what was measured.

    ``plans`` by name and ``offers``, see :func:`deltadecode.lab.calibration.fit.described`;
    ``layers`` with the ``shift`` into each and its ``need``; ``texts``, ``observed_steps`` and
    ``tokens`` (shortest and longest text). Raises CalibrationError when nothing could be measured,
    or no plan is what was asked for.
    """
    made = fitted(measurement)
    ours = made[CALIBRATED]
    lengths = [len(prompt.ids) for prompt in measurement.prompts]
    return {
        "plans": {name: described(measurement, plan) for name, plan in made.items()},
        "offers": offered(measurement, ours),
        "layers": list(measurement.layout.layers),
        "shift": _rounded(measurement.shift.curve(measurement.fit)),
        "need": _rounded(measurement.need.weights(measurement.fit)),
        "texts": len(measurement.prompts),
        "observed_steps": measurement.captured.steps(ours.budget),
        "tokens": [min(lengths), max(lengths) + measurement.new_tokens],
    }


def against(measurement: Measurement) -> dict[str, Any]:
    """The calibrated plan among others of its size.

    ``peers``: hand-picked and random plans as of :func:`described`; ``exhaustive``: how many plans
    of the size there are, the best of them for each half, and how many keep more than the
    calibrated one (None where there are too many); ``r``: R [i][j] of both halves.
    """
    ours = fitted(measurement)[CALIBRATED]
    layers, count, dense = len(measurement.layout.layers), len(ours.full), ours.dense
    peers = {
        f"hand-picked, {name}": full
        for name, full in plans.hand_picked(layers, count, dense).items()
    }
    drawn = plans.random_plans(layers, count, dense, RANDOM_PLANS)
    peers.update({f"random {n}": full for n, full in enumerate(drawn, 1)})
    r = {
        name: measurement.captured.matrix(ours.budget, texts)
        for name, texts in (("fit", measurement.fit), ("held_out", measurement.held_out))
    }
    return {
        "peers": {
            name: described(measurement, Candidate(full, dense, ours.budget))
            for name, full in peers.items()
        },
        "exhaustive": _exhaustive(measurement, ours),
        "r": {name: [_rounded(line) for line in matrix] for name, matrix in r.items()},
    }


def _exhaustive(measurement: Measurement, ours: Candidate) -> dict[str, Any] | None:
    layers, count, dense = len(measurement.layout.layers), len(ours.full), ours.dense
    total = math.comb(layers - dense - 1, count - dense - 1)
    if total > _EXHAUSTIVE:
        return None
    need = measurement.need.weights(measurement.fit)
    result: dict[str, Any] = {"plans": total}
    for name, texts in (("fit", measurement.fit), ("held_out", measurement.held_out)):
        loss = plans.losses(measurement.captured.matrix(ours.budget, texts), need)
        shares = {full: plans.kept(loss, full) for full in plans.all_plans(layers, count, dense)}
        best = max(shares, key=lambda full: shares[full])
        own = shares[ours.full]
        result[name] = {
            "best": [measurement.layout.layers[place] for place in best],
            "best_kept": round(shares[best], 5),
            "ours_kept": round(own, 5),
            # Sums in another order differ in the last digits.
            "better": sum(share > own + 1e-12 for share in shares.values()),
        }
    return result


def plan_file(
    report: dict[str, Any], model: Any, name: str, data: str, command: str
) -> tuple[DeltaConfig, dict[str, Any]]:
    """The calibrated plan and its ``meta``, for :meth:`DeltaConfig.save`.

    ``meta`` holds title, source, model, config_hash, data, date, versions, expected (recall and
    kept share of the held-out texts, attended fraction) and all plans.
    """
    ours = report["plans"][CALIBRATED]
    fields = DeltaConfig().to_dict()
    meta = {
        "title": f"calibrated for {name}",
        "source": command,
        "model": name,
        "config_hash": config_hash(model),
        "data": data,
        "texts": report["texts"],
        "tokens": report["tokens"],
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "versions": versions(),
        "expected": {
            "recall": ours["recall"]["held_out"],
            "kept": ours["kept"]["held_out"],
            "attended_fraction": ours["attended_fraction"],
        },
        "plans": report["plans"],
    }
    return DeltaConfig.from_dict({key: ours[key] for key in fields if key in ours}), meta


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]
