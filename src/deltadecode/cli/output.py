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
    """Refuse a tag that cannot be a part of a result's name."""
    if tag is None:
        return
    from deltadecode.lab import results

    try:
        results.check_tag(tag)
    except ValueError as error:
        raise BadInput(str(error)) from error


def stdout() -> Console:
    """Console of results; made anew, since stdout may have been replaced."""
    return Console(highlight=False)


def stderr() -> Console:
    """Console of progress and notes."""
    return Console(stderr=True, highlight=False)


def one_line(error: BaseException | str) -> str:
    """First line of a message, without line breaks; never empty."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    return next((line for line in lines if line), "no message")


def complain(message: str) -> None:
    """Print an error as one line on stderr."""
    print(f"deltadecode: error: {' '.join(message.split())}", file=sys.stderr)


def note(message: str) -> None:
    """Print a remark, plain text, on stderr."""
    stderr().print(message, style="dim", markup=False, soft_wrap=True)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object, on one line, to stdout."""
    # Escaped where stdout could not carry the letters themselves.
    utf8 = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    print(json.dumps(value, ensure_ascii=not utf8))


def quiet_libraries() -> None:
    """Import the libraries, and keep their advice, progress bars and warnings out of the output."""
    # Read by the libraries when they are imported.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    with stderr().status("loading PyTorch and Transformers"):
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def progress_bar(name: str, total: float) -> Iterator[tuple[Progress, Any]]:
    """Show a bar on stderr, if that is a terminal; yields the bar and its only task."""
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


def progress_reporter(
    bar: Progress, task: Any, *, note_labels: bool = False
) -> Callable[..., None]:
    """Make a function that shows progress: in the bar, or as notes where none can be drawn.

    It takes what runs, the share of the work that is done and, if it is known, the seconds left;
    the task of the bar has 1 unit of work. With ``note_labels`` each new label is a note at once.
    """
    last_label, last_note = "", time.monotonic()

    def show(label: str, done: float, left: float | None = None) -> None:
        nonlocal last_label, last_note
        remaining = "" if left is None else f", {left / 60:.1f} min left"
        bar.update(task, completed=done, description=label + remaining)
        is_due = time.monotonic() - last_note >= _NOTE_SECONDS
        if bar.disable and (is_due or (note_labels and label != last_label)):
            last_label, last_note = label, time.monotonic()
            note(f"{done:4.0%} {label}{remaining}")

    return show
