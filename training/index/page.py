"""The result of an evaluation as a table for the documentation.

python training/index/page.py benchmarks/results/index-20261129-smollm2.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NAMES = {
    "full": "full attention",
    "delta": "DELTA, default plan",
    "quest-kv": "Quest, each KV head",
    "lessismore": "LessIsMore, DELTA's layers",
    "streaming": "StreamingLLM",
    "oracle": "oracle: each layer chooses",
}
COLUMNS = {
    "stdlib-docs": "docs, KL · same", "stdlib-code": "code, KL · same", "single": "needle, %",
    "multikey": "multi-key, %", "chain-text": "chain, KL · same", "chain": "chain, %",
}  # fmt: skip


def name_of(row: Row, budget: int) -> str:
    """As the page calls a policy; ``budget`` is the one that all have but for what is said."""
    policy, _, options = row["policy"].partition(":")
    if policy == "index":
        kind = options.partition("which=")[2].partition(":")[0].rpartition("-")[0]
        name = f"index, {kind.removesuffix('-max')}, {row['target']}"
        if "pool=max" in options:
            name += ", largest token"
        return name if row["budget"] == budget else f"{name}, reads as DELTA"
    if policy == "delta" and options:
        return "DELTA, calibrated plan"
    return NAMES[policy]


def column_of(row: Row) -> str:
    """Title of a task's column."""
    return next(title for key, title in COLUMNS.items() if key in row["case"])


def lines(rows: Sequence[Row]) -> list[str]:
    """The table in Markdown: a line for each policy, those of DELTA and its peers first.

    Behind a KL stands the share of steps at which full attention would write the same token.
    """
    budget = next(row["budget"] for row in rows if row["policy"] == "delta")
    titles = [title for title in COLUMNS.values() if any(column_of(r) == title for r in rows)]
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(name_of(row, budget), {})[column_of(row)] = row
    order = [name for name in found if not name.startswith("index")]
    order.sort(key=["full attention", "DELTA, default plan"].count, reverse=True)
    order += [name for name in found if name.startswith("index")]
    made = [f"| policy | read | {' | '.join(titles)} |", "|---|--:" + "|--:" * len(titles) + "|"]
    for name in order:
        cells = [_value(found[name].get(title)) for title in titles]
        first = next(found[name][title] for title in titles if title in found[name])
        made.append(f"| {name} | {_reads(first)} | {' | '.join(cells)} |")
    return made


def _reads(row: Row) -> str:
    other = row["metadata_fraction"]
    besides = f" + {100 * other:.1f}" if other else ""
    return f"{100 * row['attended_fraction']:.1f}{besides} %"


def _value(row: Row | None) -> str:
    if row is None:
        return "–"
    if "kl" not in row:
        return f"{100 * row['score']:.0f}"
    # Rounding may leave a KL of 0 below it.
    return f"{max(row['kl'], 0):.4f} · {100 * row['score']:.1f}"


if __name__ == "__main__":
    print("\n".join(lines(json.loads(Path(sys.argv[1]).read_text())["rows"])))
