"""Command line of the calibration benchmark."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import benchmarks.command as cli


def calibration(
    model: Annotated[str, typer.Argument(help="As deltadecode calibrate takes it.")] = "smollm2",
    plan: Annotated[
        Path | None, typer.Option(help="What deltadecode calibrate -o wrote; else it is made now.")
    ] = None,
    text: Annotated[list[Path] | None, typer.Option(help="A further text; repeatable.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens before the rows.")] = 6000,
    rows: Annotated[int, typer.Option(min=1, help="Decode steps of each piece.")] = 128,
    pieces: Annotated[int, typer.Option(min=1, help="Pieces of each text.")] = 1,
    attended_fraction: Annotated[float, typer.Option(help="Of a plan that is made now.")] = 0.31,
    minutes: Annotated[float, typer.Option(min=0, help="For a plan that is made now.")] = 8.0,
    random: Annotated[int, typer.Option(min=0, help="Random plans of the same reads.")] = 100,
    device: Annotated[str, typer.Option(help="As PyTorch names it.")] = "cpu",
    as_json: cli.Json = False,
    out: cli.Out = None,
    tag: cli.Tag = None,
) -> None:
    """Compare the calibrated plan with others on texts that it was not calibrated on.

    The others: the model's own plan, as it is and at equal reads; a plan that anyone can guess;
    random plans of the same reads; and every layer selecting for itself as many pages.
    """
    with cli.checking(out, tag):
        from benchmarks.calibration.run import Task, run
        from benchmarks.report import table

    command = cli.command_line(
        "calibration", model, plan=plan, text=text, context=context, rows=rows, pieces=pieces,
        attended_fraction=None if plan else attended_fraction, minutes=None if plan else minutes,
        random=random, device=device,
    )  # fmt: skip
    task = Task(model, plan, text or [], context, rows, pieces, attended_fraction, minutes, random,
                device)  # fmt: skip
    with cli.progress() as show:
        result = run(command, task, show)
    cli.deliver(result, out, tag, as_json, partial(table, title=result["summary"]))


if __name__ == "__main__":
    cli.launch(calibration)
