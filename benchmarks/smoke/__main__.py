"""Command line of the record of smoke tests."""

from pathlib import Path
from typing import Annotated

import typer

import benchmarks.command as cli


def smoke(
    reports: Annotated[
        list[Path],
        typer.Argument(help="JUnit reports; a later one of a release replaces the same tests."),
    ],
    note: Annotated[
        list[str] | None,
        typer.Option(help="RELEASE: what to know of it, or why it was not run; repeatable."),
    ] = None,
    as_json: cli.Json = False,
    out: cli.Out = None,
    tag: cli.Tag = None,
) -> None:
    """Record which releases of vLLM the smoke tests ran with.

    A report is what ``make smoke-vllm RELEASE=0.31.0 ARGS=--junitxml=0.31.0.xml`` writes.
    """
    with cli.checking(out, tag):
        from benchmarks.smoke.run import record, table

        names = [report.name for report in reports]
        result = record(cli.command_line("smoke", *names, note=note), reports, note or [])
    cli.deliver(result, out, tag, as_json, table)


if __name__ == "__main__":
    cli.launch(smoke)
