"""Plans of one model on texts that none of them was chosen on."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.process_memory import high_water_mib
from deltadecode.cli import loading
from deltadecode.config import DeltaConfig
from deltadecode.errors import CalibrationError
from deltadecode.lab.calibration.report import interval, report
from deltadecode.lab.calibration.run import CALIBRATED, Calibration, calibrate
from deltadecode.lab.calibration.space import Request, Space
from deltadecode.lab.calibration.texts import FIRST_SEED, cut
from deltadecode.lab.plans import random_plans
from deltadecode.lab.policies.base import Floats, Policy
from deltadecode.lab.policies.oracle import Oracle
from deltadecode.lab.results import result, rounded, row
from deltadecode.lab.rows import RowsText
from deltadecode.lab.tasks.text import SOURCES, Text

Progress = Callable[..., None]
# A plan for a model of 30 layers that needs no measurement, only a look at others' plans.
GUESSED: dict[str, Any] = {
    "page_size": 16, "budget_pages": 32, "recent_pages": 8, "sink_pages": 1,
    "dense_layers": (0, 1), "delta_layers": (2, 7, 12, 17, 23),
}  # fmt: skip
_TEXTS = 6  # of a calibration that is made here, and pieces of a source that it may have seen


@dataclass(frozen=True)
class Task:
    """What is compared on what; see the command line."""

    model: str
    plan: Path | None
    texts: list[Path]
    context: int
    rows: int
    pieces: int
    fraction: float
    minutes: float
    random: int
    device: str


@dataclass(frozen=True)
class Measured:
    """A plan on all rows of one text, all [rows]."""

    kl: Floats
    lost: Floats  # loss of the text's next token, less that of full attention
    same: Floats


def run(command: str, task: Task, progress: Progress) -> dict[str, Any]:
    """Measure all plans; a row compares the KL of the calibrated plan with another's on one text.

    ``means`` has, by plan, KL, perplexity ratio and top-1 over all texts; ``random`` the mean KL of
    each random plan; and, where the plan was made here, ``calibration``, its report, with
    ``seconds`` from the weights to the plan and ``peak_mib``.
    """
    folder = loading.resolve_model(task.model)
    tokenizer = loading.load_tokenizer(folder)
    model = loading.load_model(folder, "float32", loading.find_device(task.device))
    lengths = np.array([float(task.context)])
    more: dict[str, Any] = {}
    if task.plan is None:
        found = _calibrated(model, tokenizer, task, lengths, progress)
        more = {"calibration": report(found), "seconds": round(found.seconds, 1)}
        more["peak_mib"] = round(high_water_mib())
        ours = found.chosen
    else:
        ours = DeltaConfig.load(task.plan)
    space = Space(model, Request(ours, fraction=0.999), lengths)
    plans = _plans(model, space, ours, task.random)
    measured = _measured(model, tokenizer, task, space, plans, progress)
    return {**_result(command, space, ours, plans, measured), **more}


def _calibrated(
    model: Any, tokenizer: Any, task: Task, lengths: Floats, progress: Progress
) -> Calibration:
    texts = [Text(source=name, context=task.context, tokens=task.rows) for name in SOURCES]
    request = Request(DeltaConfig.for_model(model), fraction=task.fraction)
    return calibrate(model, cut(tokenizer, texts, _TEXTS), request, lengths, minutes=task.minutes,
                     progress=progress)  # fmt: skip


def _plans(model: Any, space: Space, ours: DeltaConfig, count: int) -> dict[str, Policy]:
    """Every plan by name, the calibrated one first."""
    own = DeltaConfig.for_model(model)
    named = {CALIBRATED: ours, "default": own}
    with suppress(CalibrationError):  # its full layers alone may read more
        equal = Space(model, Request(own, fraction=space.reads(ours)), space.lengths).default()
        if equal is not None:
            named["default, equal reads"] = equal
    if space.layers == 30:
        named["guessed"] = replace(ours, **GUESSED)
    full = space.places(ours)
    for number, places in enumerate(random_plans(space.layers, len(full), 0, count), 1):
        named[f"random {number}"] = space.plan(
            places, ours.recent_pages, ours.sink_pages, ours.budget_pages
        )
    oracle = Oracle(space.layout, ours.budget_pages * ours.page_size, ours.page_size)
    plans: dict[str, Policy] = {name: space.policy(cfg) for name, cfg in named.items()}
    return {**plans, "every layer for itself": oracle}


def _measured(
    model: Any, tokenizer: Any, task: Task, space: Space, plans: dict[str, Policy],
    progress: Progress,
) -> dict[str, dict[str, Measured]]:  # fmt: skip
    """By text and plan."""
    size: dict[str, Any] = {"context": task.context, "tokens": task.rows}
    texts = {name: Text(source=name, **size) for name in SOURCES}
    texts.update({path.stem: Text(file=str(path), **size) for path in task.texts})
    start = time.monotonic()
    parts: dict[str, dict[str, list[Any]]] = {name: {p: [] for p in plans} for name in texts}
    total, done = len(texts) * task.pieces * len(plans), 0
    for name, text in texts.items():
        for piece in unseen_pieces(tokenizer, text, task.pieces):
            prepared = RowsText.prepare(model, torch.tensor(piece), task.context)
            for plan, policy in plans.items():
                losses = prepared.compare(prepared.log_probs(model, policy))
                parts[name][plan].append((losses.kl, losses.nll - losses.nll_full, losses.same))
                done += 1
                taken = time.monotonic() - start
                progress(name, done / total, taken / done * (total - done))
    return {
        name: {
            plan: Measured(
                *(torch.cat(one).double().cpu().numpy() for one in zip(*some, strict=True))
            )
            for plan, some in by_plan.items()
        }
        for name, by_plan in parts.items()
    }


def unseen_pieces(tokenizer: Any, text: Text, count: int) -> list[list[int]]:
    """Pieces behind those that a calibration takes of a text."""
    return text.pieces(tokenizer, range(FIRST_SEED, FIRST_SEED + _TEXTS + count))[_TEXTS:]


def _result(
    command: str, space: Space, ours: DeltaConfig, plans: dict[str, Policy],
    measured: dict[str, dict[str, Measured]],
) -> dict[str, Any]:  # fmt: skip
    rows = []
    for text, by_plan in measured.items():
        base = by_plan[CALIBRATED]
        for name, plan in by_plan.items():
            if name == CALIBRATED or name.startswith("random"):
                continue
            rows.append(
                row(
                    text, name, "KL against full attention, nats a token", base.kl.mean(),
                    plan.kl.mean(), difference=rounded((plan.kl - base.kl).mean()),
                    difference_interval=interval(plan.kl - base.kl), **_shown(plan),
                )
            )  # fmt: skip
    means = {
        name: {
            "kl": rounded(np.mean([by_plan[name].kl.mean() for by_plan in measured.values()])),
            **_shown(*(by_plan[name] for by_plan in measured.values())),
            "attended_fraction": round(
                float(policy.expected(space.lengths, 0).sum() / space.lengths.sum()), 5
            ),
        }
        for name, policy in plans.items()
    }
    drawn = {name: means.pop(name)["kl"] for name in list(means) if name.startswith("random")}
    best = means[CALIBRATED]["kl"]
    summary = ", ".join(
        [
            f"calibrated: KL {best:.3g}, perplexity ×{means[CALIBRATED]['perplexity_ratio']:.4f}",
            f"{sum(kl < best for kl in drawn.values())} of {len(drawn)} random plans have less",
        ]
    )
    return {
        **result("calibration", command, rows), "summary": summary, "plan": ours.to_dict(),
        "means": means, "random": drawn,
    }  # fmt: skip


def _shown(*texts: Measured) -> dict[str, float]:
    return {
        "perplexity_ratio": rounded(math.exp(np.mean([text.lost.mean() for text in texts]))),
        "same_top1": rounded(np.mean([text.same.mean() for text in texts])),
    }
