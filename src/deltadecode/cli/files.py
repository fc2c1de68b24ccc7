"""Files that commands write: checked before the work begins, written after its result is shown."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from deltadecode.cli.output import BadInput, note, one_line

# Formats that matplotlib writes without further programs.
PICTURES = (".png", ".pdf", ".svg", ".eps", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")


class OutputError(Exception):
    """A result that is shown but could not be written: exit code 1."""


def check_file(option: str, path: Path) -> Path:
    """Refuse a path that no file can be written to, or give it back; what is in it now stays."""
    if path.is_dir():
        raise BadInput(f"{option} must be a file, {str(path)!r} is a folder")
    if not path.resolve().parent.is_dir():
        raise BadInput(f"{option}: the folder of {str(path)!r} does not exist")
    try:
        if path.is_file():
            with path.open("ab"):
                pass
        elif not path.exists():
            with path.open("xb"):
                pass
            path.unlink()
        elif not os.access(path, os.W_OK):
            raise PermissionError(None, "Permission denied")
    except OSError as error:
        raise BadInput(f"{option}: cannot write {str(path)!r}: {error.strerror}") from error
    return path


def picture_file(option: str, path: Path) -> Path:
    """File of a figure, checked as :func:`check_file` does: a PNG where the name has no suffix."""
    if not path.suffix:
        path = path.with_name(f"{path.name}.png")
    if path.suffix.lower() not in PICTURES:
        raise BadInput(f"{option} must end in {', '.join(PICTURES)}, got {str(path)!r}")
    return check_file(option, path)


def check_folder(option: str, path: Path) -> Path:
    """Refuse a path that no folder with new files can be at, or give it back; nothing is made."""
    try:
        if path.exists() and not path.is_dir():
            raise BadInput(f"{option} must be a folder, got {str(path)!r}")
        # The nearest that is there: all below it would be made.
        nearest = next(folder for folder in (path, *path.resolve().parents) if folder.exists())
        with tempfile.TemporaryDirectory(dir=nearest):
            pass
    except OSError as error:
        raise BadInput(f"{option}: cannot write to {str(path)!r}: {error.strerror}") from error
    return path


def attempt(path: Path, write: Callable[[], str]) -> str | None:
    """Write one output, and note the remark that comes back; what went wrong, or None."""
    try:
        note(write())
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else None
        return f"cannot write {str(path)!r}: {reason or one_line(error)}"
    return None


def write_each(*outputs: tuple[Path, Callable[[], str]]) -> None:
    """Write to each path, whether or not those before it could be written; see :func:`attempt`."""
    failures = [failure for path, write in outputs if (failure := attempt(path, write))]
    if failures:
        raise OutputError("; ".join(failures))
