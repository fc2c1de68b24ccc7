"""Figures of an evaluation, from its rows alone. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from deltadecode.lab.evaluation.summary import by_task

_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown",
           "tab:pink", "tab:olive", "tab:cyan", "black")  # fmt: skip
_MARKERS = "osD^v<>PX*"
# Inches of a legend: what a column has beside its text, a letter, and a line.
_KEY, _LETTER, _LINE = 0.7, 0.075, 0.19
_APART = 1.12  # of neighbouring numbers on a logarithmic axis, lest they overlap


def draw(rows: Sequence[dict[str, Any]], folder: Path, name: str) -> list[Path]:
    """Draw accuracy over the budget, over the reads, and where the traces go wrong.

    Of the task ``text``, it is the KL to full attention that is drawn.
    Files are ``<name>-budget.png``, ``<name>-reads.png`` and, if any sample of a task with a
    reference went wrong, ``<name>-first-wrong.png``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tasks = by_task(rows)
    written = []
    for kind, panel in (("budget", _over_budget), ("reads", _over_reads), ("first-wrong", _wrong)):
        if kind == "first-wrong" and not any(line["wrong_somewhere"] for line in rows):
            continue
        width = 1 + 7 * len(tasks)
        figure = Figure(figsize=(width, 6), layout="constrained")
        panels = figure.subplots(1, len(tasks), squeeze=False)[0]
        for axes, (task, lines) in zip(panels, tasks.items(), strict=True):
            panel(axes, lines)
            axes.set_title(f"{task}, {lines[0]['samples']} samples", fontsize=9)
            axes.grid(alpha=0.3)
        handles = {
            label: handle
            for axes in panels
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        longest = max(map(len, handles), default=1)
        columns = max(1, int(width / (_KEY + _LETTER * longest)))
        figure.set_figheight(6 + _LINE * ceil(len(handles) / columns))
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8
        )
        path = folder / f"{name}-{kind}.png"
        figure.savefig(path, dpi=100)
        written.append(path)
    return written


def _series(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    series: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["policy"] != "full":
            series.setdefault(line["policy"], []).append(line)
    return series


def _style(place: int) -> dict[str, Any]:
    color, again = place % len(_COLORS), place // len(_COLORS)
    return {"color": _COLORS[color], "marker": _MARKERS[(color + 3 * again) % len(_MARKERS)]}


def _accuracy(axes: Any, lines: Sequence[dict[str, Any]], key: str, factor: float) -> None:
    of_text = "kl" in lines[0]
    name, scale = ("kl", 1.0) if of_text else ("score", 100.0)
    for place, (policy, points) in enumerate(_series(lines).items()):
        points = sorted(points, key=lambda line: line[key])
        score = np.array([scale * line[name] for line in points])
        bounds = scale * np.array([line[f"{name}_interval"] for line in points]).T
        axes.errorbar(
            [factor * line[key] for line in points], score,
            yerr=np.maximum(np.abs(bounds - score), 0.0), label=policy, capsize=2, **_style(place),
        )  # fmt: skip
    if of_text:
        axes.set_yscale("log")
        axes.set_ylabel("KL to full attention, nats a token")
        return
    for line in lines:
        if line["policy"] == "full":
            axes.axhline(100 * line["score"], color="grey", linestyle="--", label="full")
    axes.set_ylabel("score, %")


def _over_budget(axes: Any, lines: Sequence[dict[str, Any]]) -> None:
    _accuracy(axes, lines, "budget", 1.0)
    axes.set_xscale("log", base=2)
    shown: list[int] = []
    for budget in sorted({line["budget"] for line in lines if line["budget"]}):
        if not shown or budget >= _APART * shown[-1]:
            shown.append(budget)
    axes.set_xticks(shown, [f"{budget:,}" for budget in shown], minor=False)
    axes.set_xlabel("budget of a sparse layer, tokens")


def _over_reads(axes: Any, lines: Sequence[dict[str, Any]]) -> None:
    _accuracy(axes, lines, "reads", 100.0)
    axes.set_xlabel("tokens read, % of full attention")


def _wrong(axes: Any, lines: Sequence[dict[str, Any]]) -> None:
    """Share of the samples that have gone wrong by each token, at each policy's largest budget."""
    for place, (policy, points) in enumerate(_series(lines).items()):
        line = max(points, key=lambda point: point["budget"])
        places = sorted(token for token in line["first_wrong"] if token is not None)
        share = 100 * np.arange(1, len(places) + 1) / line["samples"]
        end = max(line["tokens_new"], places[-1] if places else 0)
        axes.step(
            [0, *places, end], [0, *share, share[-1] if places else 0], where="post",
            label=policy, color=_style(place)["color"],
        )  # fmt: skip
    axes.set_xlabel("token of the answer")
    axes.set_ylabel("samples gone wrong by then, %")
