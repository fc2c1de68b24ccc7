"""The figure of a kernel benchmark, from its result alone. Needs matplotlib."""

from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_COLORS = {"dense": "blue", "scores": "purple", "delta": "orange", "sparse": "green"}
# Distinct for each further peer; ours are drawn through.
_STYLES = ("--", ":", "-.")
_OURS = "ours"
# (operation, side) -> (batch, context) -> (µs, TB/s)
Series = dict[tuple[str, str], dict[tuple[int, int], tuple[float, float]]]


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw times and achieved bandwidths to a PNG file, a line of panels per head shape."""
    shapes = dict.fromkeys(row["heads"] for row in result["rows"] if "tb_s" in row)
    by_heads = {heads: series(result, heads) for heads in shapes}
    if not by_heads:
        raise ValueError("the result has no attention rows to draw")
    copy = result["bandwidth"]["copy_tb_s"]
    figure = Figure(figsize=(20, 1 + 4 * len(by_heads)), layout="constrained")
    panels = figure.subplots(len(by_heads), 4, squeeze=False)
    for line, (heads, lines) in zip(panels, by_heads.items(), strict=True):
        points = {point for values in lines.values() for point in values}
        batch = _most_common([b for b, _ in points])
        context = _most_common([n for _, n in points])
        for at, panel in enumerate(line):
            axis, fixed, name = (1, batch, "batch") if at < 2 else (0, context, "context")
            _panel(panel, lines, at % 2, axis=axis, fixed=fixed, copy=copy)
            panel.set_title(f"heads {heads}, {name} {fixed}")
    handles = {
        label: handle
        for panel in panels.flat
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), ncols=len(handles), loc="outside upper center",
        title=", ".join(result["machine"]["gpus"][:1]),
    )  # fmt: skip
    figure.savefig(path, dpi=100)


def series(result: dict[str, Any], heads: str) -> Series:
    """Collect what is drawn for one head shape; see :data:`Series`.

    Peers appear with the operation that they ran, so those of a Δ-layer once, as dense attention.
    """
    lines: Series = {}
    for row in result["rows"]:
        if row.get("heads") != heads or "tb_s" not in row:
            continue
        point = row["batch"], row["context"]
        lines.setdefault((row["op"], _OURS), {})[point] = row["ours"], row["tb_s"]
        if "peer_tb_s" in row:
            theirs = row["theirs"], row["peer_tb_s"]
            lines.setdefault((row["peer_op"], row["peer"]), {})[point] = theirs
    return lines


def _panel(panel: Any, lines: Series, quantity: int, *, axis: int, fixed: int, copy: float) -> None:
    """Draw over the context (axis 1) or the batch (axis 0), at one value of the other."""
    peers = list(dict.fromkeys(side for _, side in lines if side != _OURS))
    for (op, side), values in lines.items():
        drawn = {at[axis]: value[quantity] for at, value in values.items() if at[1 - axis] == fixed}
        points = sorted(drawn.items())
        style = "-" if side == _OURS else _STYLES[peers.index(side) % len(_STYLES)]
        panel.plot(
            [x for x, _ in points], [y for _, y in points],
            style, color=f"tab:{_COLORS[op]}", label=f"{op}, {side}",
            marker="o" if side == _OURS else "x",
        )  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.set_xlabel("context, tokens" if axis else "batch")
    panel.grid(alpha=0.3)
    if quantity == 0:
        panel.set_yscale("log")
        panel.set_ylabel("µs a call")
    else:
        panel.axhline(copy, color="grey", linewidth=1, label=f"copy, {copy:.2f} TB/s")
        panel.set_ylabel("TB/s")
        panel.set_ylim(bottom=0)


def _most_common(values: list[int]) -> int:
    """Return the value with the most points; the larger of two that have as many."""
    return max(Counter(values).items(), key=lambda item: (item[1], item[0]))[0]
