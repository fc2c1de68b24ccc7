"""Rows and table of the memory benchmark."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from benchmarks.memory.caches import DELTA, OURS
from deltadecode.lab.results import rounded, row

RANDOM, MEASURED = "random", "measured"
# The ways in which Δ-layers select pages.
SELECTIONS = {
    RANDOM: "by random weights, nearly at random: the worst case",
    MEASURED: "by a walk that changes as many pages a step as a real model did on real texts",
}
UNIT = "ms a step"
LAYER_GRAPHS = "layer graphs: in steps from DELTA's own caches"


def point_rows(
    found: dict[str, dict[str, Any]], batch: int, context: int
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows of one batch and context, and what was left out.

    Each has the step time of one other cache (``theirs``) beside the offloaded one of DELTA
    (``ours``), one row for each way to select pages. Stock caches read everything, whatever is
    selected. ``tokens`` is the length after all steps.
    """
    ours = found[OURS]
    case = f"batch {batch}, {context:,} tokens"
    skipped = left_out(case, found)
    if "why" in ours:
        return [], skipped
    rows = []
    for name, theirs in found.items():
        if name == OURS or "why" in theirs:
            continue
        for mode in (mode for mode in (MEASURED, RANDOM) if mode in ours):
            times = theirs[mode if name == DELTA else RANDOM], ours[mode]
            shared: dict[str, Any] = {}
            for side, place, taken in (("theirs", theirs, times[0]), ("ours", ours, times[1])):
                for key in ("tokens", "gpu_bytes", "gpu_peak", "host_bytes", "fill_s"):
                    shared[f"{key}_{side}"] = place[key]
                shared[f"p10_{side}"], shared[f"p90_{side}"] = (
                    rounded(taken["p10"]), rounded(taken["p90"])
                )  # fmt: skip
                shared[f"steps_{side}"], shared[f"rounds_{side}"] = taken["steps"], taken["rounds"]
            rows.append(
                row(
                    f"{case}, {mode} selections", name, UNIT, times[1]["ms"], times[0]["ms"],
                    kind="step", batch=batch, context=context, selections=mode,
                    hit_rate=times[1]["hit_rate"], fetched_bytes=times[1]["fetched_bytes"],
                    gpu_bytes_ratio=round(theirs["gpu_bytes"] / ours["gpu_bytes"], 2), **shared,
                )
            )  # fmt: skip
    return rows, skipped


def left_out(case: str, found: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """The caches that did not fit, and why."""
    return [
        {"case": f"{case}: {name}", "why": one["why"]}
        for name, one in found.items()
        if "why" in one
    ]


def longest_row(
    found: dict[str, dict[str, Any]], size: float, host: int | None
) -> list[dict[str, Any]]:
    """Rows of the longest contexts on a GPU of ``size`` GB: here more is better.

    ``by_gpu`` is what the GPU alone would hold, ``held`` whether it was held in a run.
    """
    ours = found[OURS]
    rows = []
    for name, theirs in found.items():
        if name == OURS or not theirs["tokens"] or not ours["tokens"]:
            continue
        both = {
            f"{key}_{side}": place[key]
            for side, place in (("ours", ours), ("theirs", theirs))
            for key in ("by_gpu", "host_bytes", "held", "why")
        }
        made = row(
            f"longest context, batch 1, a GPU of {size:g} GB", name, "tokens", ours["tokens"],
            theirs["tokens"], kind="longest", gpu_gb=size, host_free=host,
            ratio_by_gpu=round(ours["by_gpu"] / theirs["by_gpu"], 3), **both,
        )  # fmt: skip
        ratio = round(ours["tokens"] / theirs["tokens"], 3)
        rows.append({**made, "ours": ours["tokens"], "theirs": theirs["tokens"], "ratio": ratio})
    return rows


def memory_table(result: dict[str, Any]) -> Table:
    """Show a result, one line per row and one per cache that did not fit."""
    gpus = result["machine"]["gpus"]
    title = f"memory: {result['model']}, {gpus[0] if gpus else result['machine']['cpu']}"
    modes = {line.get("selections") for line in result["rows"]}
    notes = [f"{mode} selections: {note}" for mode, note in SELECTIONS.items() if mode in modes]
    if result.get("layer_graphs"):
        notes.append(LAYER_GRAPHS)
    shown = Table(title=title, title_justify="left", caption="\n".join(notes) or None)
    for name in ("case", "peer", "unit", "theirs", "ours", "ratio", "notes"):
        right = name in ("theirs", "ours", "ratio")
        shown.add_column(name, justify="right" if right else "left")
    for line in result["rows"]:
        many = line["unit"] == "tokens"
        values = [f"{line[side]:,}" if many else f"{line[side]:.4g}" for side in ("theirs", "ours")]
        cells = line["case"], line["peer"], line["unit"], *values, f"{line['ratio']:.2f}×"
        shown.add_row(*cells, _notes(line))
    for line in result.get("skipped", []):
        shown.add_row(line["case"], "", "", "", "", "", f"does not fit: {line['why']}")
    return shown


def _notes(line: dict[str, Any]) -> str:
    if line.get("kind") == "step":
        sizes = [f"{line[f'gpu_bytes_{side}'] / 1e9:.2f}" for side in ("theirs", "ours")]
        return (
            f"{' and '.join(sizes)} GB on the GPU, {line['host_bytes_ours'] / 1e9:.1f} GB on the "
            f"host, hit rate {line['hit_rate']:.3f}"
        )
    if line.get("kind") == "longest":
        held = [name for name in ("theirs", "ours") if line[f"held_{name}"]]
        return f"held in a run: {' and '.join(held) or 'neither'}"
    if line.get("kind") == "prompt":
        peaks, steps = (
            [f"{line[f'{key}_{side}'] / unit:.2f}" for side in ("theirs", "ours")]
            for key, unit in (("gpu_peak", 1e9), ("step_ms", 1))
        )
        return f"{' and '.join(peaks)} GB of the GPU at most, {' and '.join(steps)} ms a step"
    if "added" in line:
        return f"adds {line['added']:.5f}"
    return f"hit rate {line['hit_rate']:.3f}"
