"""The files of Python's library, which several trainings read as text."""

from __future__ import annotations

import sysconfig
from pathlib import Path

FOLDER = Path(sysconfig.get_paths()["stdlib"])
_WITHOUT = {"test", "tests", "site-packages", "idlelib"}


def library_files(*without: str) -> list[Path]:
    """Modules in the order of their paths, but for tests, IDLE, installed packages and ``without``.

    ``without`` are names of further folders.
    """
    out = _WITHOUT | set(without)
    return sorted(path for path in FOLDER.rglob("*.py") if not out & set(path.parts))


def read(path: Path) -> str:
    """Its text; bytes that are not UTF-8 are left out."""
    return path.read_text(encoding="utf-8", errors="ignore")
