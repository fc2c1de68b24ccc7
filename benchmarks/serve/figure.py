"""The figure of a load, from its result alone. Needs matplotlib."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_SIDES = {"theirs": ("stock vLLM", "tab:gray", "s"), "ours": ("DELTA", "tab:orange", "o")}
Points = dict[str, dict[str, list[tuple[float, float, str]]]]


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the time of an output token over the tokens of all a second, a panel per workload."""
    workloads = points(result)
    if not workloads:
        raise ValueError("the result has no runs of both servers to draw")
    figure = Figure(figsize=(5 * len(workloads), 4.2), layout="constrained")
    panels = figure.subplots(1, len(workloads), squeeze=False)[0]
    for panel, (workload, sides) in zip(panels, workloads.items(), strict=True):
        for side, found in sides.items():
            name, color, marker = _SIDES[side]
            x, y, rates = zip(*found, strict=True)
            panel.plot(x, y, marker=marker, color=color, label=name)
            for place, rate in zip(zip(x, y, strict=True), rates, strict=True):
                panel.annotate(rate, place, textcoords="offset points", xytext=(4, 4), fontsize=8)
        panel.set_title(workload)
        panel.set_xlabel("output tokens/s of the server")
        panel.set_ylabel("ms per output token, median request")
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend()
    gpus = result["machine"]["gpus"]
    figure.suptitle(f"{result['model']}, {gpus[0] if gpus else result['machine']['cpu']}")
    figure.savefig(path, dpi=100)


def points(result: dict[str, Any]) -> Points:
    """Collect what is drawn: workload -> side -> (tokens/s, ms, rate), ascending in the load."""
    found: Points = {}
    for line in result["rows"]:
        for side in _SIDES:
            point = line[f"tok_s_{side}"], line[f"tpot_p50_{side}"], line["rate"]
            found.setdefault(line["workload"], {}).setdefault(side, []).append(point)
    return {
        workload: {side: sorted(places) for side, places in sides.items()}
        for workload, sides in found.items()
    }
