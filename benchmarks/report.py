"""What becomes of a result: a file, its figure and a table."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.table import Table

from deltadecode.cli.output import one_line
from deltadecode.lab.results import write_result

# Name of what runs now, and the part of all work that is done.
Progress = Callable[[str, float], None]


def write(
    found: dict[str, Any],
    folder: Path,
    tag: str | None,
    say: Callable[[str], None],
    figure: str | None = None,
) -> None:
    """Write a result file and, where matplotlib is there, a figure of the same name.

    ``figure`` is a module with ``draw(found, path)``, imported only here. Each line that ``say``
    gets is what was written, or why it was not.
    """
    path = write_result(found, folder, tag)
    say(f"wrote {path}")
    if figure is None:
        return
    try:
        import_module(figure).draw(found, path.with_suffix(".png"))
    except ImportError as error:
        say(f"no figure drawn: {reason(error)}; pip install 'deltadecode[lab]' brings matplotlib")
    except Exception as error:  # the numbers are written, and are worth more than their picture
        say(f"no figure drawn: {reason(error)}")
    else:
        say(f"wrote {path.with_suffix('.png')}")


def reason(error: BaseException) -> str:
    """Type of an error and the first line of its message."""
    return f"{type(error).__name__}: {one_line(error)[:200]}"


def table(found: dict[str, Any]) -> Table:
    """Show a result, one line per row."""
    machine = found["machine"]
    on_gpu = found["benchmark"] == "kernels" and machine["gpus"]
    title = f"{found['benchmark']}: {machine['gpus'][0] if on_gpu else machine['cpu']}"
    shown = Table(title=title, title_justify="left")
    for name in ("case", "unit", "peer", "theirs", "ours", "ratio"):
        shown.add_column(name, justify="left" if name in ("case", "unit", "peer") else "right")
    for line in found["rows"]:
        values = f"{line['theirs']:.1f}", f"{line['ours']:.1f}", f"{line['ratio']:.2f}×"
        shown.add_row(line["case"], line["unit"], line["peer"], *values)
    return shown
