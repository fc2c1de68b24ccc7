"""Reads JUnit reports of the smoke tests into one row for each release of vLLM."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.table import Table

from deltadecode.lab.results import result

# What tests/engines/vllm/conftest.py puts into a report: packages and the commit.
NAMES = ("vllm", "torch", "transformers", "commit")
OUTCOMES = ("passed", "failed", "skipped")


def record(command: str, reports: Sequence[Path], notes: Sequence[str]) -> dict[str, Any]:
    """Make a result with a row for each release that a report or a note names, in their order.

    A note is ``RELEASE: text``. Raises ValueError for one that is not, and for a file that is no
    report of the smoke tests.
    """
    said = dict(_split(note) for note in notes)
    rows: dict[str, dict[str, Any]] = {}
    outcomes: dict[str, dict[tuple[str, str], str]] = {}
    for report in reports:
        names, found = _read(report)
        release = names["vllm"].partition("+")[0]
        rows[release] = {"release": release, **names}
        outcomes.setdefault(release, {}).update(found)
    for release, found in outcomes.items():
        counts = Counter(found.values())
        rows[release].update({outcome: counts[outcome] for outcome in OUTCOMES})
        rows[release]["files"] = sorted({file for file, _ in found})
    for release, note in said.items():
        rows.setdefault(release, {"release": release})["note"] = note
    ordered = sorted(rows, key=lambda release: [int(n) for n in re.findall(r"\d+", release)])
    return result("smoke", command, [rows[release] for release in ordered])


def _split(note: str) -> tuple[str, str]:
    release, colon, text = note.partition(": ")
    if not colon or not re.match(r"\d+\.\d+", release):
        raise ValueError(f"--note must be 'RELEASE: text', got {note!r}")
    return release, text


def _read(report: Path) -> tuple[dict[str, str], dict[tuple[str, str], str]]:
    """What a report is of, and what became of each test, by its file and name."""
    try:
        root = ElementTree.parse(report).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"{report.name} cannot be read: {error}") from error
    said = {each.get("name"): each.get("value") or "" for each in root.iter("property")}
    lacks = [name for name in NAMES if name not in said]
    if lacks:
        raise ValueError(f"{report.name} is no report of the smoke tests: no {', '.join(lacks)}")
    found = {}
    for case in root.iter("testcase"):
        file = case.get("classname", "").rpartition(".")[2]
        kinds = {part.tag for part in case}
        bad = kinds & {"failure", "error"}
        outcome = "failed" if bad else "skipped" if "skipped" in kinds else "passed"
        found[file, case.get("name", "")] = outcome
    return {name: said[name] for name in NAMES}, found


def table(result: dict[str, Any]) -> Table:
    """Show what became of each release."""
    shown = Table(title=f"smoke: {result['machine']['cpu']}", title_justify="left")
    for name in ("vLLM", "torch", *OUTCOMES, "note"):
        shown.add_column(name, justify="right" if name in OUTCOMES else "left")
    for row in result["rows"]:
        cells = (row.get(name, "–") for name in ("torch", *OUTCOMES))
        shown.add_row(row["release"], *map(str, cells), row.get("note", ""))
    return shown
