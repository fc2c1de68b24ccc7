"""``deltadecode bench``: the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltadecode.cli.output import (
    BadInput,
    note,
    print_json,
    progress_bar,
    quiet_libraries,
    stdout,
)

bench = typer.Typer(pretty_exceptions_enable=False)


@bench.callback(invoke_without_command=True)
def _bench(context: typer.Context) -> None:
    """Measure DELTA beside its peers."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@bench.command()
def cpu(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write cpu-<date>[-tag].json to.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Last part of the file's name.")] = None,
) -> None:
    """Time one decode step on the CPU, and its peak memory: stock Transformers and DELTA.

    A random model of the shape of Qwen2.5-0.5B, bfloat16 and float32, up to 32k tokens of context,
    both in turns in one run. Takes some minutes; needs 4 GiB of memory.
    """
    quiet_libraries()
    from deltadecode.benchmark.cpu import run
    from deltadecode.benchmark.results import check_tag, table, write_result

    try:
        check_tag(tag)
    except ValueError as error:
        raise BadInput(str(error)) from error
    if out is not None and out.exists() and not out.is_dir():
        raise BadInput(f"--out must be a folder, got {str(out)!r}")
    with progress_bar("benchmark", 1.0) as (bar, task):
        found = run(progress=lambda case, done: bar.update(task, completed=done, description=case))
    if out is not None:
        note(f"wrote {write_result(found, out, tag)}")
    if as_json:
        print_json(found)
    else:
        stdout().print(table(found))
