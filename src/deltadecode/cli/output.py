"""Where output goes: results to stdout; progress, notes and one-line errors to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from deltadecode.errors import DeltaDecodeError

_NOTE_SECONDS = 15  # between progress notes where no bar can be drawn


class BadInput(DeltaDecodeError):
    """What was asked for cannot be done: exit code 2."""


def check_tag(tag: str | None) -> None:
    """Refuse a tag that cannot be a part of a result's name.

    Parameters
    ----------
    tag : str or None
        What was typed.

    Raises
    ------
    BadInput
        Naming what may be in it.
    """
    from deltadecode.lab import results

    try:
        results.check_tag(tag)
    except ValueError as error:
        raise BadInput(str(error)) from error


def stdout() -> Console:
    """Console of results; made anew, since stdout may have been replaced.

    Returns
    -------
    rich.console.Console
    """
    return Console(highlight=False)


def stderr() -> Console:
    """Console of progress and notes.

    Returns
    -------
    rich.console.Console
    """
    return Console(stderr=True, highlight=False)


def one_line(error: BaseException | str) -> str:
    """First line of a message, without line breaks.

    Parameters
    ----------
    error : BaseException or str
        The message, or the error that has it.

    Returns
    -------
    str
        Never empty.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    return next((line for line in lines if line), "no message")


def complain(message: str) -> None:
    """Print an error as one line on stderr.

    Parameters
    ----------
    message : str
        What is wrong.
    """
    print(f"deltadecode: error: {' '.join(message.split())}", file=sys.stderr)


def note(message: str) -> None:
    """Print a remark on stderr.

    Parameters
    ----------
    message : str
        Plain text.
    """
    stderr().print(message, style="dim", markup=False, soft_wrap=True)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object, on one line, to stdout.

    Parameters
    ----------
    value : dict
        The object.
    """
    print(json.dumps(value, ensure_ascii=False))


def quiet_libraries() -> None:
    """Keep advice, progress bars and warnings of the libraries out of the output."""
    # Read by the libraries when they are imported.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def progress_bar(name: str, total: float) -> Iterator[tuple[Progress, Any]]:
    """Show a bar on stderr, if that is a terminal.

    Parameters
    ----------
    name : str
        What goes on.
    total : float
        Units of work.

    Yields
    ------
    tuple
        The bar, and its only task.
    """
    console = stderr()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    # No redirection: text for stdout must not end up on stderr while the bar is drawn.
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bar:
        yield bar, bar.add_task(name, total=total)


def teller(bar: Progress, shown: Any) -> Callable[[str, float, float | None], None]:
    """Make a function that shows progress: in the bar, or as notes where none can be drawn.

    Parameters
    ----------
    bar : rich.progress.Progress
        See :func:`progress_bar`.
    shown
        Its task, of 1 unit of work.

    Returns
    -------
    callable
        Takes what runs, the share of the work that is done, and the seconds left or None.
    """
    last = time.monotonic()

    def tell(label: str, done: float, left: float | None) -> None:
        nonlocal last
        remaining = "" if left is None else f", {left / 60:.1f} min left"
        bar.update(shown, completed=done, description=label + remaining)
        if bar.disable and time.monotonic() - last >= _NOTE_SECONDS:
            last = time.monotonic()
            note(f"{done:4.0%} {label}{remaining}")

    return tell
