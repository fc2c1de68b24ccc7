"""The folder of a report: its files are replaced together or not at all."""

from __future__ import annotations

import json
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltadecode.errors import InspectionError
from deltadecode.lab.inspection.names import FIGURE_FILES

if TYPE_CHECKING:
    from deltadecode.lab.inspection.pages import PageMap

PAGE, NUMBERS = "index.html", "report.json"
FILES = (PAGE, NUMBERS, *FIGURE_FILES)
KIND = "deltadecode inspection"  # what tells a report of ours from other JSON


def check_report_folder(folder: Path) -> None:
    """Refuse a folder that holds files of these names but no report of ours, which is replaced."""
    try:
        report = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        report = None
    if isinstance(report, dict) and report.get("kind") == KIND:
        return
    for name in FILES:
        if (folder / name).exists():
            raise InspectionError(
                f"{str(folder / name)!r} is there and no report of 'deltadecode inspect' is; "
                "choose another --out"
            )


def write_report(report: dict[str, Any], pages: PageMap, folder: Path) -> None:
    """Write the page, the numbers and the figures. Needs Plotly and matplotlib.

    Parameters
    ----------
    report : dict
        See :func:`deltadecode.lab.inspection.report.make_report`.
    pages : PageMap
        Of the same inspection.
    folder : Path
        Made if it does not exist. Until all files are there, it stays as it is.
    """
    from deltadecode.lab.inspection.figures import draw
    from deltadecode.lab.inspection.page import write_page

    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".new-report-", dir=folder) as name:
            new = Path(name)
            text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
            (new / NUMBERS).write_text(text + "\n", encoding="utf-8")
            write_page(report, pages, new / PAGE)
            draw(report, pages, new)
            _replace(new, folder)
    except BaseException:
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        raise


def _replace(new: Path, folder: Path) -> None:
    """Move all files into the folder; when one cannot be moved, the old ones come back."""
    moved: list[str] = []
    with _uninterrupted(), tempfile.TemporaryDirectory(prefix=".old-report-", dir=folder) as name:
        old = Path(name)
        try:
            for file in FILES:
                moved.append(file)
                if (folder / file).exists():
                    (folder / file).replace(old / file)
                (new / file).replace(folder / file)
        except OSError:
            for file in moved:
                if (old / file).exists():
                    (old / file).replace(folder / file)
                elif not (new / file).exists():
                    (folder / file).unlink()
            raise


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let an interrupt from the keyboard wait until the end; only the main thread gets one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if waiting:
            signal.raise_signal(signal.SIGINT)
