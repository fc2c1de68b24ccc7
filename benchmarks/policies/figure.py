"""One figure: a line for each policy, a panel for each task, a mark for each context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.policies.cases import TEXTS
from benchmarks.policies.tables import axes, by_policy

# Colours that are told apart without red and green (Okabe and Ito), and marks besides.
_STYLES = (("#0072B2", "o"), ("#E69F00", "s"), ("#CC79A7", "^"), ("#000000", "D"))
_LINE, _LETTER = 0.36, 0.085  # inches of a policy's line, and of a letter of its name


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the scores of tasks, and the KL of texts on a logarithmic axis."""
    tasks, contexts = axes(result)
    policies = by_policy(result)
    names = list(policies)
    margin = _LETTER * max(map(len, names))
    size = (margin + 2.6 * len(tasks), 1.3 + _LINE * len(names))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        key, scale = ("kl", 1.0) if task in TEXTS else ("score", 100.0)
        for number, context in enumerate(contexts):
            color, mark = _STYLES[number % len(_STYLES)]
            # Contexts stand one below the other within a policy's line.
            shift = 0.24 * (number - (len(contexts) - 1) / 2)
            points = [
                (place + shift, rows[task, context])
                for place, rows in enumerate(policies.values())
                if (task, context) in rows and (key == "score" or rows[task, context][key] > 0)
            ]
            value = [scale * row[key] for _, row in points]
            bounds = [
                [abs(scale * (row[f"{key}_interval"][end] - row[key])) for _, row in points]
                for end in (0, 1)
            ]
            panel.errorbar(
                value, [place for place, _ in points], xerr=bounds, fmt=mark, color=color,
                markersize=5, elinewidth=1, capsize=2, label=f"{context:,} tokens",
            )  # fmt: skip
        panel.set_title(f"{task}: KL, nats a token" if key == "kl" else f"{task}: score, %")
        if key == "kl":
            panel.set_xscale("log")
        else:
            panel.set_xlim(-3, 103)
        for place in range(0, len(names), 2):
            panel.axhspan(place - 0.5, place + 0.5, color="0.95", zorder=0)
        panel.grid(axis="x", alpha=0.4)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(contexts))
    figure.savefig(path, dpi=110)
