"""Command line of the calibration benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks.command import Json, Out, Tag, checking, command_line, deliver, launch, progress


def calibration(
    problems: Annotated[
        int, typer.Option(min=2, help="Half of them are fitted, half held out.")
    ] = 16,
    as_json: Json = False,
    out: Out = None,
    tag: Tag = None,
) -> None:
    """Calibrate the embedded model: seconds, memory, and its plan among all others.

    The plan is compared with the paper's rule, hand-picked and random plans, and, by what it keeps
    of the attention to the other half of the problems, with every plan of its size.
    """
    with checking(out, tag):
        from benchmarks.calibration.run import run

    command = command_line("calibration", problems=problems)
    with progress() as show:
        found = run(command, lambda done, left: show("calibration", done, left), problems)
    deliver(found, out, tag, as_json, _table, "deltadecode.lab.calibration.figures")


def _table(found: dict[str, Any]) -> Table:
    shown = Table(title=f"{found['seconds']:.0f} s, {found['peak_mib']} MiB")
    for name in ("plan", "share lost", "ours", "ratio"):
        shown.add_column(name)
    for line in found["rows"]:
        values = f"{line['theirs']:.4f}", f"{line['ours']:.4f}", f"{line['ratio']:.2f}×"
        shown.add_row(line["peer"], *values)
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Run with these arguments, by default those of the process, and exit."""
    launch(calibration, arguments)


if __name__ == "__main__":
    main()
