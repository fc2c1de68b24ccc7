"""From the files of a comparison to a result: one row for each policy, task and context."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.policies.cases import TASKS
from deltadecode.errors import EvaluationError
from deltadecode.lab.evaluation.records import Records, digest
from deltadecode.lab.evaluation.summary import load, summarize
from deltadecode.lab.results import result

_KEPT = (
    "samples", "score", "score_interval", "difference", "difference_interval",
    "attended_fraction", "metadata_fraction", "tokens_kept", "kl", "kl_interval",
    "perplexity", "perplexity_ratio", "perplexity_ratio_interval", "rows",
)  # fmt: skip


def make_result(folder: Path, command: str) -> dict[str, Any]:
    """A result file's content; cells that were not finished are left out, and named.

    Where samples were made at several commits, ``commits`` has them all and ``commit`` one of them.
    A row has what the evaluation's summary says of a cell, and ``scores`` (of a text: ``kls``), one
    for each sample in the order of the seeds.
    """
    try:
        names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{str(folder)!r} holds no comparison of policies") from error
    cells, unfinished = _finished(load([folder]))
    full = {_experiment(c): c for c in cells if c.settings["policy"] == "full"}
    order = list(names)
    cells.sort(key=lambda c: (list(TASKS).index(_task(c)), _context(c), order.index(_spec(c))))
    rows = [_row(cell, full[_experiment(cell)], names[_spec(cell)]) for cell in cells]
    made = result("policies", command, rows)
    newest = cells[-1].made_by
    made |= {key: newest[key] for key in ("commit", "machine", "versions") if key in newest}
    commits = sorted({str(cell.made_by.get("commit")) for cell in cells})
    if len(commits) > 1:
        made["commits"] = commits
    made["chat"] = cells[0].settings["chat"]
    made["kascade"] = {
        path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("kascade-*.json"))
    }
    made["unfinished"] = unfinished
    return made


def _finished(cells: Sequence[Records]) -> tuple[list[Records], list[str]]:
    """Cells with as many samples as full attention has, and the names of the others."""
    finished, others = [], []
    full = {_experiment(c): set(c.samples) for c in cells if c.settings["policy"] == "full"}
    for cell in cells:
        wanted = full.get(_experiment(cell))
        if wanted and set(cell.samples) == wanted:
            finished.append(cell)
        else:
            place = f"{_task(cell)} at {_context(cell)}"
            others.append(f"{place}, {_without_folder(cell.settings['policy'])}")
    if not finished:
        raise EvaluationError("no task has been run to its end with full attention")
    return finished, sorted(others)


def _experiment(cell: Records) -> str:
    return digest({k: v for k, v in cell.settings.items() if k not in ("policy", "budget")})


def _spec(cell: Records) -> str:
    return str(cell.settings["policy"])


def _row(cell: Records, full: Records, name: str) -> dict[str, Any]:
    line = summarize([full] if cell is full else [full, cell])[-1]
    per_sample = "kl" if "kl" in line else "score"
    values = [round(cell.samples[seed][per_sample], 5) for seed in sorted(cell.samples)]
    task, context = _task(cell), _context(cell)
    return {
        "case": f"{task} at {context}, {name}",
        **{key: line[key] for key in ("peer", "unit", "ours", "theirs", "ratio")},
        "task": task,
        "context": context,
        "policy": name,
        "options": _without_folder(_spec(cell)),
        "budget": line["budget"],
        "dtype": cell.settings["dtype"],
        **{key: line[key] for key in _KEPT if key in line},
        f"{per_sample}s": values,
    }


def _context(cell: Records) -> int:
    task = cell.settings["task"]
    return int(task.get("context", task.get("length", 0)))


def _task(cell: Records) -> str:
    task = cell.settings["task"]
    kinds = {"single": "needle", "multikey": "multi-key"}
    sources = {"stdlib-docs": "docs", "stdlib-code": "code"}
    name = kinds.get(task.get("kind")) or sources.get(task.get("source")) or task["name"]
    assert name in TASKS, name
    return str(name)


def _without_folder(spec: str) -> str:
    """A policy's options, without the folder of a file among them."""
    before, sign, path = spec.partition("fit=")
    return f"{before}{sign}{Path(path).name}" if sign else spec
