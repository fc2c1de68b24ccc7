"""The files of Python's library, which several trainings read as text."""

from __future__ import annotations

import importlib.util
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


def package_files(name: str) -> list[Path]:
    """Modules of an installed package in the order of their paths, but for tests.

    Raises
    ------
    ValueError
        When no such package is installed.
    """
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        raise ValueError(f"no package {name!r} is installed")
    folder = Path(folders[0])
    files = (path.relative_to(folder) for path in folder.rglob("*.py"))
    return [folder / path for path in sorted(files) if not _WITHOUT & set(path.parts)]


def read(path: Path) -> str:
    """Its text; bytes that are not UTF-8 are left out."""
    return path.read_text(encoding="utf-8", errors="ignore")
