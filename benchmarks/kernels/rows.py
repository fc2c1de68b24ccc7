"""Rows and table of the kernel benchmark, from times."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from benchmarks.kernels.cases import Shape, moved_bytes
from benchmarks.kernels.timing import Bandwidth, Timing
from benchmarks.report import shown
from deltadecode.lab.results import rounded, row

OURS = "deltadecode"
# What every attention is measured against, whoever else is there: its bytes at the speed of a copy.
FLOOR = "copy bandwidth"
ROUNDING = "exact, rounded to bfloat16"
# "scores" is what a Δ-layer's selection waits for.
_ATTENTION = ("dense", "scores", "delta", "sparse")


def attention_rows(
    shape: Shape,
    timings: Mapping[tuple[str, str], Timing],
    sets: Mapping[str, int],
    bandwidth: Bandwidth,
) -> list[dict[str, Any]]:
    """Make the rows of one shape: one per operation and peer.

    The first of each operation is against :data:`FLOOR`. The peers of a Δ-layer are those of dense
    attention, since nobody else's kernel scores pages. ``tb_s`` and ``peer_tb_s`` are bytes that
    have to be moved ÷ time, in 10¹² bytes/s; ``copy_fraction`` is our part of the copy bandwidth,
    and ``floor_us`` the time at all of it. ``timings`` are by (operation, side), ``sets`` counts
    the input sets of an operation.
    """
    rows = []
    for op in _ATTENTION:
        ours = timings[op, OURS]
        size = moved_bytes(op, shape)
        floor_us = size / bandwidth.copy * 1e6
        shared = {
            "op": op, "heads": shape.heads_label, "batch": shape.batch, "context": shape.context,
            "bytes": size, "tb_s": _tb_s(size, ours.us),
            "copy_fraction": round(floor_us / ours.us, 3), "floor_us": rounded(floor_us),
            "input_sets": sets[op], "graph_ours": ours.graph,
        }  # fmt: skip
        case = f"{op}, {shape.label}"
        rows.append(row(case, FLOOR, "us", ours.us, floor_us, **shared))
        peer_op = "sparse" if op == "sparse" else "dense"
        peer_bytes = moved_bytes(peer_op, shape)
        for (of, side), theirs in timings.items():
            if of == peer_op and side != OURS:
                peer = {"peer_op": peer_op, "peer_tb_s": _tb_s(peer_bytes, theirs.us)}
                peer["graph"] = theirs.graph
                rows.append(row(case, side, "us", ours.us, theirs.us, **shared, **peer))
    return rows


def error_rows(shape: Shape, errors: Mapping[tuple[str, str], float]) -> list[dict[str, Any]]:
    """Make the rows of errors against float64, of relative Frobenius norms.

    ``errors`` are by (operation, side); the side ``""`` is the exact result, rounded.
    """
    return [
        row(
            f"error of {op}, {shape.label}", side or ROUNDING, "relative error",
            errors[op, OURS], error, op=f"error of {op}",
            heads=shape.heads_label, batch=shape.batch, context=shape.context,
        )
        for (op, side), error in errors.items()
        if side != OURS
    ]  # fmt: skip


def kernel_table(result: dict[str, Any]) -> Table:
    """Show a result, all sides of a case on one line: a peer's value, and it ÷ ours."""
    lines: dict[str, dict[str, dict[str, Any]]] = {}
    for line in result["rows"]:
        lines.setdefault(line["case"], {})[line["peer"]] = line
    peers = [peer for peer in dict.fromkeys(r["peer"] for r in result["rows"]) if peer != FLOOR]
    gpu = ", ".join(result["machine"]["gpus"][:1]) or result["machine"]["cpu"]
    copy = result["bandwidth"]["copy_tb_s"]
    title = f"kernels: {gpu}, copy {copy:.2f} TB/s; µs a call, errors against float64"
    drawn = Table(title=title, title_justify="left")
    drawn.add_column("case")
    for name in ("ours", "TB/s", "of copy", *peers):
        drawn.add_column(name, justify="right")
    for case, sides in lines.items():
        first = next(iter(sides.values()))
        cells = [case, shown(first["ours"]), "", ""]
        if "tb_s" in first:
            cells[2:] = f"{first['tb_s']:.2f}", f"{first['copy_fraction']:.0%}"
        for one in (sides.get(peer) for peer in peers):
            cells.append(f"{shown(one['theirs'])} ({one['ratio']:.2f}×)" if one else "")
        drawn.add_row(*cells)
    return drawn


def _tb_s(size: int, us: float) -> float:
    return float(f"{size / us / 1e6:.4g}")
