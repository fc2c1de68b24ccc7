"""The figure of an end-to-end benchmark, from its result alone. Needs matplotlib."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_NAMES = {"theirs": "stock vLLM", "ours": "DELTA"}
_STYLES = {"theirs": "tab:gray", "ours": "tab:orange"}
Lines = dict[int, dict[str, list[list[float]]]]


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the time of a step over the context to a PNG file, a panel per batch."""
    batches = lines(result)
    if not batches:
        raise ValueError("the result has no step times to draw")
    figure = Figure(figsize=(6 * len(batches), 4.5), layout="constrained")
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for panel, (batch, sides) in zip(panels, sorted(batches.items()), strict=True):
        for side, points in sides.items():
            marker = "o" if len(points) < 16 else ""
            x, y = zip(*points, strict=True)
            panel.plot(x, y, marker=marker, color=_STYLES[side], label=_NAMES[side])
        panel.set_title(f"{result['model']}, batch {batch}")
        panel.set_xlabel("tokens in the cache, per sequence")
        panel.set_ylabel("ms per decode step")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend()
    gpus = result["machine"]["gpus"]
    figure.suptitle(gpus[0] if gpus else result["machine"]["cpu"])
    figure.savefig(path, dpi=100)


def lines(result: dict[str, Any]) -> Lines:
    """Collect what is drawn: batch -> side -> [context, ms], ascending in context.

    The curve of a headline run where there is one, and the single points.
    """
    batches: Lines = {}
    for line in result["rows"]:
        for side in _NAMES:
            points = line.get(f"curve_{side}", [])
            if line["kind"] in ("step", "short"):
                points = [[line["context"], line[side]]]
            if points:
                batches.setdefault(line["batch"], {}).setdefault(side, []).extend(points)
    return {
        batch: {side: sorted(points) for side, points in sides.items()}
        for batch, sides in batches.items()
    }
