"""The commands, put together. PyTorch and Transformers load when a command needs them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from deltadecode.cli.calibrate import calibrate
from deltadecode.cli.demo import demo
from deltadecode.cli.eval import eval_command
from deltadecode.cli.files import OutputError
from deltadecode.cli.generate import generate
from deltadecode.cli.info import info
from deltadecode.cli.inspect import inspect
from deltadecode.cli.output import complain, one_line
from deltadecode.cli.serve import SETTINGS, serve
from deltadecode.errors import DeltaDecodeError

app = typer.Typer(
    help="DELTA sparse attention for decoding long chains of thought (arXiv 2510.09883).",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(generate)
app.command(context_settings=SETTINGS)(serve)
app.command()(info)
app.command()(calibrate)
app.command("eval")(eval_command)
app.command()(inspect)

INTERRUPTED = 130


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from deltadecode import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``deltadecode`` with these arguments, by default those of the process, and exit."""
    run_app(app, arguments, "deltadecode")


def run_app(app: typer.Typer, arguments: Sequence[str] | None, name: str) -> NoReturn:
    """Run a command line and exit.

    Raises
    ------
    SystemExit
        0: done; 2: bad usage or bad input; 1: anything else failed; 130: interrupted. Every
        failure is one line on stderr.
    """
    words = None if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A letter that the terminal does not have must not lose a result.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # Not standalone: its own error messages take several lines.
        code = app(args=words, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        complain(_usage_message(error))
        code = 2
    except DeltaDecodeError as error:
        complain(str(error))
        code = 2
    except OutputError as error:
        complain(str(error))
        code = 1
    except BrokenPipeError:  # the reader of stdout wants no more
        code = 1
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        complain(f"{type(error).__name__}: {one_line(error)}")
        code = 1
    if code == INTERRUPTED:  # what typer makes of KeyboardInterrupt, too
        complain("interrupted")
    if code:
        _drop_unwritten()
    sys.exit(code or 0)


def _drop_unwritten() -> None:
    """Forget what stdout has not taken: Python would try again at its end, and exit with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage_message(error: typer.TyperException) -> str:
    message = error.format_message()
    # A value that does not pass typer's validation is only in the error behind this one.
    details = getattr(error.__cause__, "errors", None)
    if not callable(details):
        return message
    value = details()[0]["input"]
    return f"{message}, got {value!r}"
