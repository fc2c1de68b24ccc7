"""Speed of the evaluation itself: problems in a batch beside the same problems one at a time.

``python -m benchmarks.evaluation.run``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltadecode.config import DeltaConfig
from deltadecode.lab.evaluation.cells import Cell
from deltadecode.lab.evaluation.runner import Evaluation
from deltadecode.lab.results import check_tag, result, row, table, write_result
from deltadecode.lab.tasks import model_path
from deltadecode.lab.tasks.registry import make_task

TASK = "chain:steps=12"
PROBLEMS, ALONE = 32, 2
_PEER = "one problem at a time"


def run(
    command: str,
    say: Callable[[str], None],
    task: str = TASK,
    problems: int = PROBLEMS,
    alone: int = ALONE,
) -> dict[str, Any]:
    """Solve problems with the embedded model in one batch, and some of them one at a time.

    Parameters
    ----------
    command : str
        What repeats it.
    say : callable
        Told in one line what runs.
    task : str
        See :func:`deltadecode.lab.tasks.registry.make_task`.
    problems : int
        Problems of the batch.
    alone : int
        How many of them go one at a time as well.

    Returns
    -------
    dict
        See :func:`deltadecode.lab.results.result`; a row per policy, in seconds a problem.
        ``equal`` says whether those that went both ways got the same text.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    plan = DeltaConfig.for_model(model)
    _solve(model, tokenizer, make_task("chain:steps=1"), Cell("full", 0), 1, 1)
    problem = make_task(task)
    rows = []
    for cell in (Cell("full", 0), Cell("delta", plan.page_size * plan.budget_pages)):
        say(f"{cell.label}: {alone} one at a time")
        singly, ones = _solve(model, tokenizer, problem, cell, alone, 1)
        say(f"{cell.label}: {problems} in a batch")
        together, all_of_them = _solve(model, tokenizer, problem, cell, problems, problems)
        rows.append(
            row(
                f"{cell.policy}, {task}, {problems} in a batch", _PEER, "s a problem",
                together / problems, singly / alone, problems=problems, alone=alone,
                equal=all(all_of_them[seed] == text for seed, text in ones.items()),
            )
        )  # fmt: skip
    return result("eval", command, rows)


def _solve(
    model: Any, tokenizer: Any, task: Any, cell: Cell, samples: int, batch: int
) -> tuple[float, dict[int, Any]]:
    """Seconds that a run takes, and the hash of each sample's text."""
    evaluation = Evaluation(model, tokenizer, task, samples, batch=batch)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        (found,) = evaluation.run([cell], Path(folder), lambda *told: None)
        return time.monotonic() - start, {s: r["hash"] for s, r in found.samples.items()}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="The evaluation's own speed, on CPUs.")
    parser.add_argument("--out", type=Path, help="folder to write the result to")
    parser.add_argument("--tag", default="speed", help="last part of the file's name")
    given = parser.parse_args()
    try:
        check_tag(given.tag)
    except ValueError as error:
        parser.error(str(error))
    command = "python -m benchmarks.evaluation.run"
    found = run(command, lambda text: print(text, file=sys.stderr, flush=True))
    if given.out:
        print(f"wrote {write_result(found, given.out, given.tag)}", file=sys.stderr)
    Console().print(table(found))


if __name__ == "__main__":
    main()
