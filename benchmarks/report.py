"""What becomes of a result: a file, its figure and a table."""

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
    result: dict[str, Any],
    folder: Path,
    tag: str | None,
    say: Callable[[str], None],
    figure: str | None = None,
) -> None:
    """Write a result file and, where matplotlib is there, a figure of the same name.

    ``figure`` is a module with ``draw(result, path)``, imported only here. Each line that ``say``
    gets is what was written, or why it was not.
    """
    path = write_result(result, folder, tag)
    say(f"wrote {path}")
    if figure is None:
        return
    try:
        import_module(figure).draw(result, path.with_suffix(".png"))
    except ImportError as error:
        say(f"no figure drawn: {reason(error)}; pip install 'deltadecode[lab]' brings matplotlib")
    except Exception as error:  # the numbers are written, and are worth more than their picture
        say(f"no figure drawn: {reason(error)}")
    else:
        say(f"wrote {path.with_suffix('.png')}")


def reason(error: BaseException) -> str:
    """Type of an error and the first line of its message."""
    return f"{type(error).__name__}: {one_line(error)[:200]}"


def table(result: dict[str, Any], title: str | None = None) -> Table:
    """Show a result, one line per row."""
    machine = result["machine"]
    on_gpu = result["benchmark"] == "kernels" and machine["gpus"]
    place = f"{result['benchmark']}: {machine['gpus'][0] if on_gpu else machine['cpu']}"
    drawn = Table(title=title or place, title_justify="left")
    for name in ("case", "unit", "peer", "theirs", "ours", "ratio"):
        drawn.add_column(name, justify="left" if name in ("case", "unit", "peer") else "right")
    for line in result["rows"]:
        values = shown(line["theirs"]), shown(line["ours"]), f"{line['ratio']:.2f}×"
        drawn.add_row(line["case"], line["unit"], line["peer"], *values)
    return drawn


def shown(value: float) -> str:
    """A value in a table."""
    return f"{value:.1f}" if value >= 1 else f"{value:.3g}"
