"""Speed of the evaluation itself: problems in a batch beside the same problems one at a time."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.report import Progress
from deltadecode.config import DeltaConfig
from deltadecode.lab.evaluation.cells import Cell
from deltadecode.lab.evaluation.runner import Evaluation
from deltadecode.lab.results import result, row
from deltadecode.lab.tasks import model_path
from deltadecode.lab.tasks.registry import make_task

TASK = "chain:steps=12"
PROBLEMS, ALONE = 32, 2
_PEER = "one problem at a time"


def run(
    command: str, progress: Progress, task: str = TASK, problems: int = PROBLEMS, alone: int = ALONE
) -> dict[str, Any]:
    """Solve problems with the embedded model in one batch, and some of them one at a time.

    A row per policy, in seconds a problem. ``equal`` says whether the problems that were solved
    both ways, ``alone`` of them, got the same text.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    plan = DeltaConfig.for_model(model)
    _solve(model, tokenizer, make_task("chain:steps=1"), Cell("full", 0), 1, 1)
    problem = make_task(task)
    rows = []
    cells = Cell("full", 0), Cell("delta", plan.page_size * plan.budget_pages)
    for number, cell in enumerate(cells):
        progress(f"{cell.label}: {alone} one at a time", number / 2)
        singly, ones = _solve(model, tokenizer, problem, cell, alone, 1)
        progress(f"{cell.label}: {problems} in a batch", number / 2 + 0.25)
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
        (solved,) = evaluation.run([cell], Path(folder), lambda *progress: None)
        return time.monotonic() - start, {s: r["hash"] for s, r in solved.samples.items()}
