"""The figure of a calibration, from its report alone. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_PLANS = (("calibrated", "tab:blue", "o", 1.08), ("cosine-shift", "tab:orange", "s", 1.02))


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the shift into each layer and what each needs, with our plan and the paper's (PNG)."""
    layers = report["layers"]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(layers[1:], report["shift"][1:], color="black", marker=".", label="shift 1 − cos")
    top = max(report["need"]) or 1.0
    axes.bar(
        layers, [value / top for value in report["need"]], color="0.8", width=0.7,
        label="need w, largest = 1",
    )  # fmt: skip
    for name, color, marker, height in _PLANS:
        plan = report["plans"][name]
        kept = plan["kept"]["held_out"]
        for kind, face in (("dense", "none"), ("delta", color)):
            places = plan[f"{kind}_layers"]
            label = f"{name}: {kind} layers (keeps {kept:.3f})" if kind == "delta" else None
            axes.plot(
                places, [height] * len(places), linestyle="", marker=marker, color=color,
                markerfacecolor=face, markersize=9, label=label,
            )  # fmt: skip
    axes.set_xlabel("layer")
    axes.set_ylim(0, 1.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=110)
