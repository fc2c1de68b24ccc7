"""Tables of docs/memory.md: ``python -m benchmarks.memory.page RESULT.json ...`` prints them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.memory.caches import OURS
from benchmarks.memory.prompts import prompt_cells

_STEPS = "| batch | tokens | selections | cache | ms a step | on the GPU | on the host | hit rate |"
_PROMPTS = "| tokens | chunks of | cache | prompt, s | ms a step | GPU at most | on the host |"
_LONGEST = "| GPU | cache | tokens | the GPU alone would hold | held in a run |"


def tables(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of the tables of steps, prompts and the longest contexts; a GB is 10^9 bytes."""
    rows = [
        row | {"kv_dtype": result.get("kv_dtype"), "graphs": bool(result.get("layer_graphs"))}
        for result in results
        for row in result["rows"]
    ]
    steps = [row for row in rows if row["kind"] == "step"]
    longest = [row for row in rows if row["kind"] == "longest"]
    if steps:
        yield from (_STEPS, "|---" * 8 + "|")
    shown = None
    for row in sorted(steps, key=_point):
        if _point(row) != shown:
            shown = _point(row)
            yield _step_line(row, "ours")
        # What stock caches read does not depend on what is selected: one line of them.
        if row["peer"].startswith("Delta") or row["selections"] == "random":
            yield _step_line(row, "theirs")
    prompts = [row for row in rows if row["kind"] == "prompt"]
    if steps and prompts:
        yield ""
    yield from _prompts(prompts)
    if longest:
        yield from ("", _LONGEST, "|---" * 5 + "|")
    seen = set()
    for row in longest:
        for side, name in (("ours", OURS), ("theirs", row["peer"])):
            name = _name(name, row)
            if (row["gpu_gb"], name) not in seen:
                seen.add((row["gpu_gb"], name))
                held = "yes" if row[f"held_{side}"] else "no"
                cells = f"{row['gpu_gb']:g} GB", name, f"{int(row[side]):,}"
                yield _line(*cells, f"{row[f'by_gpu_{side}']:,}", held)


def _prompts(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of the table of prompts: ours once for each length, then the others."""
    if rows:
        yield from (_PROMPTS, "|---" * 7 + "|")
    shown = None
    for row in rows:
        for side in ("theirs",) if row["tokens"] == shown else ("ours", "theirs"):
            name = _name(OURS if side == "ours" else row["peer"], row)
            shown = row["tokens"]
            yield _line(f"{shown:,}", f"{row['chunk']:,}", name, *prompt_cells(row, side))


def _point(row: dict[str, Any]) -> tuple[bool, int, int, str]:
    return row["graphs"], row["batch"], row["context"], row["selections"]


def _step_line(row: dict[str, Any], side: str) -> str:
    ours = side == "ours"
    bytes_of = [f"{row[f'{place}_bytes_{side}'] / 1e9:.2f} GB" for place in ("gpu", "host")]
    stock = not ours and not row["peer"].startswith("Delta")
    return _line(
        str(row["batch"]), f"{row['context']:,}", "any" if stock else row["selections"],
        _name(OURS if ours else row["peer"], row),
        f"{row[side]:.1f}", *bytes_of,
        f"{row['hit_rate']:.3f}" if ours else "–",
    )  # fmt: skip


def _name(name: str, row: dict[str, Any]) -> str:
    if not name.startswith("Delta"):
        return f"`{name}`"
    notes = [row["kv_dtype"], "layer graphs" if row["graphs"] else None]
    return ", ".join([f"`{name}`", *(note for note in notes if note)])


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(*tables([json.loads(Path(name).read_text()) for name in sys.argv[1:]]), sep="\n")
