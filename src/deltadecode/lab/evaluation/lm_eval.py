"""Hands a model with a policy over to lm-evaluation-harness, for tasks with data of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltadecode.errors import EvaluationError
from deltadecode.lab.evaluation.cells import Cell

_DECODING = "generate_until"


def evaluate(
    model: Any,
    tokenizer: Any,
    cell: Cell,
    tasks: Sequence[str],
    *,
    include: Path | None,
    limit: int | None,
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """Run tasks of the harness; its own greedy or sampled ``generate`` decodes with the policy.

    ``include`` is a folder with further task files; ``limit`` is in samples of each task. Gives
    ``results`` per task as the harness reports them, and ``samples``, the number of each. Raises
    EvaluationError when the harness is not installed, or a task is unknown or scored without
    decoding.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(
            f"--lm-eval needs lm-evaluation-harness: pip install 'deltadecode[lm-eval]' ({error})"
        ) from error
    manager = TaskManager(include_path=None if include is None else str(include))
    known = set(manager.all_tasks)
    for name in tasks:
        if name not in known:
            raise EvaluationError(
                f"lm-evaluation-harness has no task {name!r}; see lm_eval ls tasks"
            )
    for name, task in manager.load(list(tasks))["tasks"].items():
        kind = task.get_config("output_type")
        if kind != _DECODING:
            raise EvaluationError(
                f"task {name!r} is scored by {kind}, without decoding, where every policy is full "
                "attention"
            )
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    with cell.make(model).decoding(model):
        outcome = lm_eval.simple_evaluate(
            model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit,
            random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            fewshot_random_seed=seed, log_samples=False, bootstrap_iters=1000, verbosity="ERROR",
        )  # fmt: skip
    counts = {name: count["effective"] for name, count in outcome["n-samples"].items()}
    return {"policy": cell.policy, "budget": cell.budget, "results": outcome["results"],
            "samples": counts}  # fmt: skip
