"""A result file, its figures and its tables in the documentation, from the files of the cells."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltadecode.errors import EvaluationError
from deltadecode.lab.evaluation.records import Records
from deltadecode.lab.evaluation.summary import markdown, summarize, verdicts
from deltadecode.lab.results import result, write_result

_MADE_BY = ("commit", "machine", "versions")


def make_result(cells: Sequence[Records], command: str) -> dict[str, Any]:
    """The result of cells, as every benchmark of the project writes it.

    Commit, machine and versions are those that made the samples, not those of the report. Where the
    files disagree, ``commits`` lists all of theirs.
    """
    rows = summarize(cells)
    report = result("eval", command, rows)
    newest = cells[-1].made_by
    report |= {key: newest[key] for key in _MADE_BY if key in newest}
    commits = sorted({str(cell.made_by.get("commit")) for cell in cells})
    if len(commits) > 1:
        report["commits"] = commits
    report["settings"] = {
        k: v for k, v in cells[0].settings.items() if k not in ("policy", "budget")
    }
    report["verdicts"] = verdicts(rows)
    return report


def write(report: dict[str, Any], folder: Path, tag: str) -> list[Path]:
    """Write ``eval-<date>-<tag>.json`` and its figures, which begin with the same name."""
    from deltadecode.lab.evaluation.figures import draw

    path = write_result(report, folder, tag)
    return [path, *draw(report["rows"], folder, path.stem)]


def fill_document(document: Path, tag: str, report: dict[str, Any], files: Sequence[Path]) -> None:
    """Replace what stands between ``<!-- eval:TAG -->`` and ``<!-- /eval:TAG -->`` of a document.

    Files are named relative to it. Raises EvaluationError when it cannot be read or lacks the
    marks.
    """
    before, after = document_parts(document, tag)
    links = [relative(file, document.parent) for file in files]
    gpus = ", ".join(report["machine"].get("gpus") or [report["machine"].get("cpu", "a CPU")])
    lines = [
        "",
        f"From [{Path(links[0]).name}]({links[0]}) ({gpus}).",
        "",
        markdown(report["rows"]),
    ]
    lines += [f"- {line}" for line in report["verdicts"]]
    lines += ["", *(f"![{Path(link).stem}]({link})" for link in links[1:]), ""]
    document.write_text(before + "\n".join(lines) + after, encoding="utf-8")


def document_parts(document: Path, tag: str) -> tuple[str, str]:
    """What stands before and after the tables of a tag, both marks included."""
    begin, end = f"<!-- eval:{tag} -->", f"<!-- /eval:{tag} -->"
    try:
        text = document.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise EvaluationError(f"cannot read {str(document)!r}: {reason}") from error
    before, first, rest = text.partition(begin)
    _, second, after = rest.partition(end)
    if not (first and second):
        raise EvaluationError(f"{str(document)!r} has no {begin} ... {end} to fill")
    return before + begin, end + after


def relative(file: Path, folder: Path) -> str:
    """A file as a page in a folder links to it."""
    return Path(os.path.relpath(file, folder)).as_posix()
