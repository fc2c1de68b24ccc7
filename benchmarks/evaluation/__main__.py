"""Command line of the benchmark of the evaluation."""

from typing import Annotated

import typer

import benchmarks.command as cli


def evaluation(
    rows: Annotated[
        bool, typer.Option("--rows", help="Instead: decode steps of a text, all of them at once.")
    ] = False,
    as_json: cli.Json = False,
    out: cli.Out = None,
    tag: cli.Tag = "speed",
) -> None:
    """Time the evaluation itself on the CPU: problems in a batch beside one problem at a time."""
    with cli.checking(out, tag):
        from benchmarks.evaluation.rows import run_rows
        from benchmarks.evaluation.run import run
        from benchmarks.report import table

    with cli.progress() as show:
        measure = run_rows if rows else run
        result = measure(cli.command_line("evaluation", rows=rows), show)
    cli.deliver(result, out, tag, as_json, table)


if __name__ == "__main__":
    cli.launch(evaluation)
