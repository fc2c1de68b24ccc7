"""Runs the policies over tasks and contexts, as far as the time goes, and continues later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from benchmarks.policies.cases import CONTEXTS, TASKS, TEXTS, Entry, entries, fit_kascade
from benchmarks.policies.cases import save_names as _save_names
from deltadecode.config import DeltaConfig
from deltadecode.errors import EvaluationError, PolicyError
from deltadecode.lab.collect_env import machine, versions
from deltadecode.lab.evaluation.runner import Evaluation
from deltadecode.lab.results import commit
from deltadecode.lab.tasks.registry import make_task

Say = Callable[[str, float], None]
_SEED = 4_000_000_000  # of the first problem; no plan was chosen on these


class OutOfTime(Exception):
    """The time that was given is over; what ran is in the files."""


@dataclass
class Comparison:
    """What runs, on one model: every policy on every task at every context.

    Problems are decoded in ``dtype``. Texts run in float32, whatever that is: a KL of 0.001 is
    less than the rounding of bfloat16.
    """

    load: Callable[[str], Any]  # gives the model in a dtype
    tokenizer: Any
    folder: Path
    dtype: str = "float32"
    budget: int = 512
    plan: DeltaConfig | None = None
    samples: int = 100
    pieces: int = 4
    batch: int = 50
    chat: bool = False
    wanted: Sequence[str] = ()  # parts of names; all without
    shard: tuple[int, int] = (0, 1)
    contexts: Sequence[int] = CONTEXTS
    tasks: Sequence[str] = tuple(TASKS)
    deadline: float | None = None  # of time.monotonic()
    _models: dict[str, Any] = field(default_factory=dict)

    def run(self, say: Say) -> bool:
        """Run what the files lack; whether all of it is done."""
        work = list(self._work())
        try:
            for number, (context, task) in enumerate(work):
                self._run_task(task, context, partial(_say_at, say, number / len(work)))
        except OutOfTime:
            return False
        return True

    def _work(self) -> Iterator[tuple[int, str]]:
        for context in self.contexts:
            for task in self.tasks:
                yield context, task

    @cached_property
    def entries(self) -> list[Entry]:
        """The policies of this run; the names of all are written to the folder."""
        model = self._model("float32")

        def fit(counts: Sequence[int]) -> list[Path]:
            tokens = min(CONTEXTS[0], max(self.contexts))
            return fit_kascade(model, self.tokenizer, self.budget, counts, tokens, self.folder)

        everything = entries(model, self.budget, self.plan, fit)
        _save_names(self.folder, everything)
        chosen = [
            entry
            for entry in everything
            if not self.wanted or any(part in entry.name for part in self.wanted)
        ]
        if not chosen:
            names = "; ".join(entry.name for entry in everything)
            raise EvaluationError(f"no policy is named so; there are {names}")
        number, count = self.shard
        return chosen[number::count]

    def _model(self, dtype: str) -> Any:
        if dtype not in self._models:
            self._models[dtype] = self.load(dtype)
        return self._models[dtype]

    def _run_task(self, task: str, context: int, say: Callable[[str], None]) -> None:
        is_text = task in TEXTS
        model = self._model("float32" if is_text else self.dtype)
        made_by = {"commit": commit(), "machine": machine(), "versions": versions()}
        evaluation = Evaluation(
            model, self.tokenizer, make_task(TASKS[task].format(context=context)),
            self.pieces if is_text else self.samples, seed=0 if is_text else _SEED,
            batch=self.batch, chat=self.chat and not is_text, made_by=made_by,
        )  # fmt: skip
        longest = evaluation.trace().longest_prompt
        cells = []
        for entry in self.entries:
            try:
                entry.cell.make(model).check(longest)
            except PolicyError as error:
                say(f"left out: {error}")
            else:
                cells.append(entry.cell)

        def told(label: str, share: float, left: float | None) -> None:
            del share, left
            if self.deadline is not None and time.monotonic() > self.deadline:
                raise OutOfTime
            say(f"{task} at {context:,}: {label}")

        evaluation.run(cells, self.folder, told)


def _say_at(say: Say, share: float, text: str) -> None:
    say(text, share)
