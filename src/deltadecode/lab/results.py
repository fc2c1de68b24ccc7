"""Result files: what benchmarks and evaluations write to ``benchmarks/results/``."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltadecode.lab.collect_env import machine, versions

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def row(
    case: str, peer: str, unit: str, ours: float, theirs: float, **extras: Any
) -> dict[str, Any]:
    """Make one row of a result file: what was measured, against whom, and both values.

    Less is better in every unit. ``ratio`` = theirs ÷ ours: above 1, ours is better.
    """
    return {
        "case": case,
        "peer": peer,
        "unit": unit,
        "ours": rounded(ours),
        "theirs": rounded(theirs),
        "ratio": round(theirs / ours, 3),
        **extras,
    }


def rounded(value: float) -> float:
    """Round to the five digits that a result file has."""
    return float(f"{value:.5g}")


def result(benchmark: str, command: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put rows together with what is needed to understand and to repeat them."""
    return {
        "benchmark": benchmark,
        "command": command,
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "rows": list(rows),
    }


def check_tag(tag: str | None) -> None:
    """Refuse a tag that cannot be the last part of a file's name, with a ValueError."""
    if tag is not None and not _TAG.fullmatch(tag):
        raise ValueError(f"tag must be letters, digits, '.', '_' and '-', got {tag!r}")


def write_result(result: dict[str, Any], folder: Path, tag: str | None = None) -> Path:
    """Write ``<benchmark>-<yyyymmdd>[-tag].json`` to a folder, which is made if need be.

    The tag distinguishes files of one day. See :func:`check_tag` for its errors.
    """
    check_tag(tag)
    day = datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y%m%d")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['benchmark']}-{day}{f'-{tag}' if tag else ''}.json"
    # In one piece: a benchmark that writes as it goes may be stopped at any time.
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def commit() -> str | None:
    """Full hash of the source that runs; None outside of a git checkout of this project.

    ``-dirty`` follows it when tracked files differ from it. ``DELTADECODE_COMMIT`` in the
    environment names it where the source was copied to a machine without its history.
    """
    if named := os.environ.get("DELTADECODE_COMMIT"):
        return named
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    head = _git(root, "rev-parse", "HEAD")
    if not head:
        return None
    return head + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
