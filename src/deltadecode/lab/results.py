"""Result files: what every benchmark writes to ``benchmarks/results/``."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from deltadecode.lab.collect_env import machine, versions

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def row(
    case: str, peer: str, unit: str, ours: float, theirs: float, **extras: Any
) -> dict[str, Any]:
    """Make one row of a result file.

    Parameters
    ----------
    case : str
        What was measured.
    peer : str
        What it was measured against.
    unit : str
        Of both values; less is better.
    ours, theirs : float
        The two values.
    **extras
        Whatever else helps to read them.

    Returns
    -------
    dict
        With ``ratio`` = theirs ÷ ours, so that above 1 ours is the better one.
    """
    return {
        "case": case,
        "peer": peer,
        "unit": unit,
        "ours": float(f"{ours:.5g}"),
        "theirs": float(f"{theirs:.5g}"),
        "ratio": round(theirs / ours, 3),
        **extras,
    }


def result(benchmark: str, command: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put rows together with what is needed to understand and to repeat them.

    Parameters
    ----------
    benchmark : str
        Name of the benchmark.
    command : str
        Command that repeats it.
    rows : sequence of dict
        See :func:`row`.

    Returns
    -------
    dict
        ``benchmark``, ``command``, ``commit``, ``machine``, ``versions`` and ``rows``.
    """
    return {
        "benchmark": benchmark,
        "command": command,
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "rows": list(rows),
    }


def check_tag(tag: str | None) -> None:
    """Refuse a tag that cannot be part of a file name.

    Parameters
    ----------
    tag : str or None
        Last part of the name of a result file.

    Raises
    ------
    ValueError
        Naming the tag.
    """
    if tag is not None and not _TAG.fullmatch(tag):
        raise ValueError(f"tag must be letters, digits, '.', '_' and '-', got {tag!r}")


def write_result(found: dict[str, Any], folder: Path, tag: str | None = None) -> Path:
    """Write a result file.

    Parameters
    ----------
    found : dict
        See :func:`result`.
    folder : Path
        Made if it does not exist.
    tag : str, optional
        Told apart by it are two files of one day.

    Returns
    -------
    Path
        ``<benchmark>-<yyyymmdd>[-tag].json`` in the folder.

    Raises
    ------
    ValueError
        See :func:`check_tag`.
    """
    check_tag(tag)
    day = datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y%m%d")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{found['benchmark']}-{day}{f'-{tag}' if tag else ''}.json"
    # In one piece: a benchmark that writes as it goes may be stopped at any time.
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def write_with_figure(
    found: dict[str, Any],
    folder: Path,
    tag: str | None,
    draw: Callable[[Path], None],
    say: Callable[[str], None],
) -> None:
    """Write a result file and, where matplotlib is there, a figure beside it.

    Parameters
    ----------
    found : dict
        See :func:`result`.
    folder : Path
        Made if it does not exist.
    tag : str, optional
        See :func:`write_result`.
    draw : callable
        Imports matplotlib, and draws to a path.
    say : callable
        Told in one line each what was written, or why it was not.
    """
    path = write_result(found, folder, tag)
    say(f"wrote {path}")
    try:
        draw(path.with_suffix(".png"))
    except ImportError as error:
        say(f"no figure drawn: {reason(error)}; pip install 'deltadecode[lab]' brings matplotlib")
    except Exception as error:  # the numbers are written, and are worth more than their picture
        say(f"no figure drawn: {reason(error)}")
    else:
        say(f"wrote {path.with_suffix('.png')}")


def reason(error: BaseException) -> str:
    """Say in one line what went wrong.

    Parameters
    ----------
    error : BaseException
        The error.

    Returns
    -------
    str
        Its type and the first line of its message.
    """
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


def commit() -> str | None:
    """Commit of the source that runs.

    Returns
    -------
    str or None
        Full hash, with ``-dirty`` after it when tracked files differ from it; None outside of a
        git checkout of this project. ``DELTADECODE_COMMIT`` in the environment says it where the
        source was copied to a machine without its history.
    """
    if told := os.environ.get("DELTADECODE_COMMIT"):
        return told
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    head = _git(root, "rev-parse", "HEAD")
    if not head:
        return None
    return head + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def table(found: dict[str, Any]) -> Table:
    """Show a result as a table.

    Parameters
    ----------
    found : dict
        See :func:`result`.

    Returns
    -------
    rich.table.Table
        One line per row.
    """
    shown = Table(title=f"{found['benchmark']}: {found['machine']['cpu']}", title_justify="left")
    for name in ("case", "unit", "peer", "theirs", "ours", "ratio"):
        shown.add_column(name, justify="left" if name in ("case", "unit", "peer") else "right")
    for line in found["rows"]:
        shown.add_row(
            line["case"],
            line["unit"],
            line["peer"],
            f"{line['theirs']:.1f}",
            f"{line['ours']:.1f}",
            f"{line['ratio']:.2f}×",
        )
    return shown


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
