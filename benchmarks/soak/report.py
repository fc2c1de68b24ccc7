"""The table of a soak."""

from typing import Any

from rich.table import Table


def table(result: dict[str, Any]) -> Table:
    """Show what was done, and what became of it."""
    (line,) = result["rows"]
    gpus = result["machine"]["gpus"]
    place = gpus[0] if gpus else result["machine"]["cpu"]
    shown = Table(title=f"soak: {result['model']}, {place}", title_justify="left")
    shown.add_column(line["case"])
    shown.add_column("", justify="right")
    grown = "–" if line["growth"] is None else f"{line['growth']:+.1%}"
    for name, value in (
        ("finished, aborted", f"{line['finished']:,}, {line['aborted']:,}"),
        ("preempted", f"{line['preemptions']:,}"),
        ("tokens, seconds", f"{line['tokens']:,}, {line['seconds']:,}"),
        ("answers with a wrong token, a near tie", f"{line['wrong']:,}, {line['near_ties']:,}"),
        ("nats that a token lost by", f"{line['most_lost']:g}"),
        ("free blocks at the end, start", f"{line['free_blocks']}, {line['free_blocks_at_start']}"),
        ("memory", grown),
    ):
        shown.add_row(name, value)
    return shown
