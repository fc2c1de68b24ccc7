"""The figure of a calibration, from its report alone. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_MARKERS = "*s^DvP"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the KL of all plans by their full layers, and those that were judged (PNG)."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    counts, losses = zip(*report["measured"], strict=True) if report["measured"] else ((), ())
    axes.scatter(counts, losses, s=14, color="0.7", label="measured, fitted texts")
    for (name, plan), marker in zip(report["plans"].items(), _MARKERS, strict=False):
        full = len(plan["dense_layers"]) + len(plan["delta_layers"])
        axes.scatter(
            full, plan["kl"]["held_out"], marker=marker, s=90, edgecolors="black", linewidths=0.6,
            label=f"{name}: {plan['kl']['held_out']:.3g} held out", zorder=3,
        )  # fmt: skip
    axes.set_xlabel("layers with full attention")
    axes.set_ylabel("KL against full attention, nats a token")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=110)
