"""One JSONL file per cell: a header that says what was run, and a record for every sample.

A killed run continues from its files. Only a last line that was torn by the kill is forgiven;
anything else that does not fit is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltadecode.errors import EvaluationError

FORMAT = 1
_KIND = "deltadecode-eval"
_NEEDED = ("seed", "score", "tokens", "read", "full", "kept", "metadata")


def digest(values: Any) -> str:
    """Short hash of anything that JSON can hold."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class Records:
    """The file of one cell."""

    path: Path
    settings: dict[str, Any]  # what decides the results: model, task, policy, budget, seed, dtype
    made_by: dict[str, Any]  # what else the header holds: commit, machine, versions
    samples: dict[int, dict[str, Any]] = field(default_factory=dict)  # by seed

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any], made_by: dict[str, Any]) -> Records:
        """Continue a file, or start one; EvaluationError if it is of another evaluation."""
        if path.exists() and path.stat().st_size:
            records = cls.read(path, repair=True)
            if digest(records.settings) != digest(settings):
                why = _difference(records.settings, settings)
                raise EvaluationError(
                    f"{str(path)!r} is of another evaluation: {why}; choose another --out, or "
                    "remove the file"
                )
            return records
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {
            "kind": _KIND, "format": FORMAT, "hash": digest(settings), "settings": settings,
            "made_by": made_by,
        }  # fmt: skip
        _append(path, [header])
        return cls(path, settings, made_by)

    @classmethod
    def read(cls, path: Path, *, repair: bool = False) -> Records:
        """Read a file; ``repair`` cuts a torn last line off it.

        Raises EvaluationError when it cannot be read, is no such file, or is broken anywhere but in
        a torn last line.
        """
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise EvaluationError(f"cannot read {str(path)!r}: {error.strerror}") from error
        whole, newline, torn = raw.rpartition(b"\n")
        lines = (whole + newline).split(b"\n")[:-1]
        if torn and repair and lines:
            os.truncate(path, len(raw) - len(torn))
        header = _parsed(path, lines[0] if lines else torn, 1)
        if header.get("kind") != _KIND or header.get("hash") != digest(header.get("settings")):
            raise EvaluationError(
                f"{str(path)!r} is not a file of an evaluation: line 1 is no header"
            )
        if header.get("format") != FORMAT:
            raise EvaluationError(
                f"{str(path)!r} has format {header.get('format')}, and this version reads {FORMAT}"
            )
        records = cls(path, header["settings"], header.get("made_by", {}))
        for number, line in enumerate(lines[1:], 2):
            record = _parsed(path, line, number)
            if missing := [key for key in _NEEDED if key not in record]:
                raise EvaluationError(
                    f"{str(path)!r} is broken: line {number} has no {missing[0]!r}"
                )
            if record["seed"] in records.samples:
                raise EvaluationError(
                    f"{str(path)!r} is broken: line {number} has seed {record['seed']} again"
                )
            records.samples[record["seed"]] = record
        return records

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records, all or none of them as far as the system can promise that."""
        records = list(records)
        _append(self.path, records)
        self.samples.update((record["seed"], record) for record in records)


def _append(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _parsed(path: Path, line: bytes, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise EvaluationError(f"{str(path)!r} is broken: line {number} is not a JSON object")
    return value


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    for key in ours:
        if theirs.get(key) != ours[key]:
            return f"its {key} is {theirs.get(key)!r}, not {ours[key]!r}"
    return "its settings have more keys"
