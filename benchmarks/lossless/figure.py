"""The figure of acceptance, from results of ``python -m benchmarks.lossless`` alone.

``python -m benchmarks.lossless.figure RESULT.json ... FIGURE.svg`` draws it. Needs matplotlib.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Colours that are told apart without red and green (Okabe and Ito), and marks besides.
_STYLES = (("#0072B2", "o"), ("#E69F00", "s"), ("#CC79A7", "^"), ("#000000", "D"))
_NAMES = {"embedded": "embedded model", "smollm2": "SmolLM2-135M-Instruct"}
_DRAFTS, _CONTEXT = 4, 4000
Lines = dict[str, list[tuple[int, float]]]


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw acceptance over K by context, and over d by K; a line of panels for each result."""
    figure = Figure(figsize=(9, 3.2 * len(results)), layout="constrained", facecolor="white")
    panels = figure.subplots(len(results), 2, squeeze=False, sharey=True)
    for (left, right), result in zip(panels, results, strict=True):
        of_budget, of_drafts = lines(result)
        for panel, found in ((left, of_budget), (right, of_drafts)):
            for (label, points), (color, mark) in zip(found.items(), _STYLES, strict=False):
                places, shares = zip(*points, strict=True)
                panel.plot(places, shares, marker=mark, color=color, label=label)
                panel.set_xscale("log", base=2)
                panel.set_xticks(places, [str(place) for place in places])
            panel.set_ylim(0.5, 1.0)
            panel.grid(alpha=0.4)
            panel.legend(loc="lower right")
        left.set_title(f"{model_name(result)}, d = {_DRAFTS}")
        left.set_xlabel("K, pages of 16 tokens that a draft may read")
        left.set_ylabel("accepted ÷ verified drafts")
        right.set_title(f"{model_name(result)}, {_CONTEXT:,} tokens")
        right.set_xlabel("d, drafts before a verification")
    # Letters stay letters, and the same numbers give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "deltadecode"}):
        figure.savefig(path, metadata={"Date": None})


def lines(result: dict[str, Any]) -> tuple[Lines, Lines]:
    """Acceptance over K for each context, and over d for each K, ascending."""
    of_budget: Lines = {}
    of_drafts: Lines = {}
    for row in sorted(result["rows"], key=lambda row: (row["budget_pages"], row["draft_tokens"])):
        context, budget, drafts = row["context"], row["budget_pages"], row["draft_tokens"]
        if drafts == _DRAFTS:
            of_budget.setdefault(f"{context:,} tokens", []).append((budget, row["acceptance"]))
        if context == _CONTEXT:
            of_drafts.setdefault(f"K {budget}", []).append((drafts, row["acceptance"]))
    return of_budget, of_drafts


def model_name(result: dict[str, Any]) -> str:
    """Name of a result's model, as its command has it."""
    words = shlex.split(result["command"])
    name = words[words.index("--model") + 1]
    return _NAMES.get(name, name)


if __name__ == "__main__":
    *files, drawn = map(Path, sys.argv[1:])
    draw([json.loads(file.read_text(encoding="utf-8")) for file in files], drawn)
