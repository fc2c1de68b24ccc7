"""The result as one table, for the documentation and for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.policies.cases import TASKS, TEXTS

Row = dict[str, Any]
_GAP = "–"


def by_policy(result: dict[str, Any]) -> dict[str, dict[tuple[str, int], Row]]:
    """Rows by policy, then by task and context; policies in the order of the result."""
    table: dict[str, dict[tuple[str, int], Row]] = {}
    for row in result["rows"]:
        table.setdefault(row["policy"], {})[row["task"], row["context"]] = row
    return table


def axes(result: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Tasks and contexts of a result, in their order."""
    tasks = [task for task in TASKS if any(row["task"] == task for row in result["rows"])]
    return tasks, sorted({row["context"] for row in result["rows"]})


def main_context(contexts: Sequence[int]) -> int:
    """The context whose reads and intervals are shown: the middle one."""
    return contexts[len(contexts) // 2]


def cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and lines; several values in a cell are those of the contexts."""
    tasks, contexts = axes(result)
    main = main_context(contexts)
    titles = ["policy", f"read at {main:,}"]
    for task in tasks:
        titles.append(f"{task}, KL" if task in TEXTS else f"{task}, %")
        if task == tasks[0] and task not in TEXTS:
            titles.append(f"− full at {main:,} [95 %]")
    if text := [task for task in tasks if task in TEXTS]:
        titles.append(f"perplexity ÷ full at {main:,}")
    lines = []
    for policy, rows in by_policy(result).items():
        line = [policy, _reads(rows, tasks, main)]
        for task in tasks:
            line.append(" · ".join(_value(rows.get((task, context))) for context in contexts))
            if task == tasks[0] and task not in TEXTS:
                line.append(_difference(rows.get((task, main))))
        if text:
            line.append(" · ".join(_perplexity(rows.get((task, main))) for task in text))
        lines.append(line)
    return titles, lines


def _value(row: Row | None) -> str:
    if row is None:
        return _GAP
    return f"{row['kl']:.3f}" if "kl" in row else f"{100 * row['score']:.0f}"


def _perplexity(row: Row | None) -> str:
    return _GAP if row is None else f"{row['perplexity_ratio']:.3f}"


def _difference(row: Row | None) -> str:
    if row is None or row["options"] == "full":
        return _GAP
    low, high = row["difference_interval"]
    return f"{100 * row['difference']:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]"


def _reads(rows: dict[tuple[str, int], Row], tasks: Sequence[str], context: int) -> str:
    """Of the first task that was run, in per cent; what is read besides after the plus."""
    row = next((rows[task, context] for task in tasks if (task, context) in rows), None)
    if row is None:
        return _GAP
    besides = row["metadata_fraction"]
    more = f" + {100 * besides:.0f}" if besides else ""
    return f"{100 * row['attended_fraction']:.0f}{more} %"


def markdown(result: dict[str, Any]) -> str:
    """The table in Markdown."""
    titles, lines = cells(result)
    head = ["| " + " | ".join(titles) + " |", "|---" + "|--:" * (len(titles) - 1) + "|"]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def table(result: dict[str, Any]) -> Table:
    """The table for a terminal."""
    _, contexts = axes(result)
    title = "values at " + " · ".join(f"{context:,}" for context in contexts) + " tokens"
    titles, lines = cells(result)
    shown = Table(title=title, title_justify="left")
    for number, name in enumerate(titles):
        shown.add_column(name, justify="right" if number else "left", no_wrap=number == 0)
    for line in lines:
        shown.add_row(*line)
    return shown


def fill(document: Path, result: dict[str, Any], json_file: Path, figure: Path) -> None:
    """Replace what stands between the marks ``eval:policies`` of a page by table and figure."""
    from deltadecode.lab.evaluation.report import document_parts, relative

    before, after = document_parts(document, "policies")
    device = (result["machine"].get("gpus") or [result["machine"].get("cpu", "a CPU")])[0]
    link, picture = (relative(file, document.parent) for file in (json_file, figure))
    lines = ["", f"From [{json_file.name}]({link}) ({device}).", "", markdown(result)]
    if result["unfinished"]:
        lines += [f"Not run to the end: {'; '.join(result['unfinished'])}.", ""]
    lines += [f"![{figure.stem}]({picture})", ""]
    document.write_text(before + "\n".join(lines) + after, encoding="utf-8")
