"""The figure of an end-to-end benchmark: step time over context. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_NAMES = {"stock": "stock vLLM", "delta": "DELTA"}
_COLORS = {"stock": "tab:grey", "delta": "tab:orange"}


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw what both sides measured: steps after a prefill as marks, long decodes as lines.

    Parameters
    ----------
    found : dict
        See :func:`deltadecode.benchmark.e2e.run`.
    path : Path
        PNG file to write.

    Raises
    ------
    ValueError
        When no step was measured.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    panel = figure.subplots()
    drawn = 0
    for side, items in found["sides"].items():
        color = _COLORS[side]
        steps = sorted((i["context"], i["step_ms"]) for i in items if i["kind"] == "step")
        if steps:
            panel.plot(*zip(*steps, strict=True), "o", color=color, label=f"{_NAMES[side]}, step")
        for item in items:
            if item["kind"] == "decode":
                label = f"{_NAMES[side]}, decoding to {item['tokens']:,}"
                panel.plot(*zip(*item["curve"], strict=True), color=color, label=label)
                drawn += 1
        drawn += len(steps)
    if not drawn:
        raise ValueError("the result has no steps to draw")
    panel.set_xlabel("context, tokens")
    panel.set_ylabel("ms a decode step")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend()
    work, gpus = found["work"], found["machine"]["gpus"]
    panel.set_title(f"{work['model']}, batch {work['batch']}, {', '.join(gpus[:1]) or 'CPU'}")
    figure.savefig(path, dpi=100)
