"""What the command lines of all benchmarks share: options, progress, result files, exit codes."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from deltadecode.cli import output
from deltadecode.cli.app import run_app

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder to write <benchmark>-<date>[-tag].json to, and its figure, if any."),
]
Tag = Annotated[str | None, typer.Option(help="Last part of the files' names.")]
Base = Annotated[
    str | None, typer.Option(help="Instead: time the code of this commit beside ours, in turns.")
]
BaseSource = Annotated[
    Path | None, typer.Option(help="Unpacked source of that commit, where there is no git history.")
]


def launch(command: Callable[..., None], arguments: Sequence[str] | None = None) -> None:
    """Run the command line of one benchmark and exit, with the codes of ``deltadecode``."""
    help_options = {"help_option_names": ["-h", "--help"]}
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, context_settings=help_options
    )
    app.command()(command)
    run_app(app, arguments, f"python -m benchmarks.{command.__name__}")


def command_line(benchmark: str, *arguments: str, **options: Any) -> str:
    """Command that repeats a run, for its result file.

    An option that is None, False or an empty list is left out, a list is repeated, and a path
    becomes its last part: results name no folder.
    """
    parts = ["python", "-m", f"benchmarks.{benchmark}", *arguments]
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            parts.append(option)
        elif value is not None and value is not False:
            for one in value if isinstance(value, list) else [value]:
                parts += [option, one.name if isinstance(one, Path) else _text(one)]
    return shlex.join(parts)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@contextmanager
def checking(out: Path | None, tag: str | None) -> Iterator[None]:
    """Check where results go, and make every ValueError within a usage error."""
    output.quiet_libraries()
    output.check_tag(tag)
    if out is not None and out.exists() and not out.is_dir():
        raise output.BadInput(f"--out must be a folder, got {str(out)!r}")
    try:
        yield
    except ValueError as error:
        raise output.BadInput(str(error)) from error


@contextmanager
def progress() -> Iterator[Callable[..., None]]:
    """Show what runs: in a bar, or as notes where none can be drawn.

    Yields a function of the case that runs, the part of all work that is done and, if it is known,
    the seconds left.
    """
    with output.progress_bar("benchmark", 1.0) as (bar, task):
        yield output.progress_reporter(bar, task, note_labels=True)


def deliver(
    result: dict[str, Any],
    out: Path | None,
    tag: str | None,
    as_json: bool,
    table: Callable[[dict[str, Any]], Table],
    figure: str | None = None,
) -> None:
    """Write a result, with the figure of a module if it has one, and print it."""
    from benchmarks.report import write

    if out is not None:
        write(result, out, tag, output.note, figure)
    if as_json:
        output.print_json(result)
    else:
        output.stdout().print(table(result))
