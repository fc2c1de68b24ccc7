"""Command line of the calibration benchmark."""

from functools import partial
from typing import Annotated

import typer

import benchmarks.command as cli


def calibration(
    problems: Annotated[int, typer.Option(min=2, help="Half are fitted, half held out.")] = 16,
    as_json: cli.Json = False,
    out: cli.Out = None,
    tag: cli.Tag = None,
) -> None:
    """Calibrate the embedded model: seconds, memory, and its plan among all others.

    The plan is compared with the paper's rule, hand-picked and random plans, and, by what it keeps
    of the attention to the other half of the problems, with every plan of its size.
    """
    with cli.checking(out, tag):
        from benchmarks.calibration.run import run
        from benchmarks.report import table

    command = cli.command_line("calibration", problems=problems)
    with cli.progress() as show:
        result = run(command, lambda done, left: show("calibration", done, left), problems)
    shown = partial(table, title=f"{result['seconds']:.0f} s, {result['peak_mib']} MiB")
    cli.deliver(result, out, tag, as_json, shown, "deltadecode.lab.calibration.figures")


if __name__ == "__main__":
    cli.launch(calibration)
