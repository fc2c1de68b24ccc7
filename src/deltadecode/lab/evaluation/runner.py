"""Runs cells sample by sample in batches, and continues where a killed run stopped."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltadecode.architecture import longest_prompt, text_config
from deltadecode.errors import EvaluationError
from deltadecode.lab.evaluation.cells import Cell, Trace, expected_fraction, slug
from deltadecode.lab.evaluation.losses import encode_text, text_records
from deltadecode.lab.evaluation.records import Records, digest
from deltadecode.lab.generation import (
    Encoded,
    encode,
    new_tokens,
    solve_batch,
    teacher_forced_batch,
)
from deltadecode.lab.policies import make_policy
from deltadecode.lab.tasks.registry import Perplexity
from deltadecode.lab.tasks.sample import Task, options_of
from deltadecode.lab.tasks.text import Text

# Told what runs, the share of all work that is done, and the seconds left (None: not known yet).
Progress = Callable[[str, float, "float | None"], None]
_LONGEST_NAME = 180  # of a file; systems take 255 bytes
_TYPICAL_ANSWER = 0.5  # of the most new tokens, for tasks without a reference


@dataclass
class Evaluation:
    """A model, a task and its samples."""

    model: Any  # until it runs, the model's configuration will do
    tokenizer: Any
    task: Task
    samples: int  # seeds are seed, seed + 1, ...
    seed: int = 0
    batch: int = 16  # rows that go together
    chat: bool = False  # whether prompts go through the tokenizer's chat template
    keep_outputs: bool = False  # whether records hold the whole texts
    # for the headers of the files: commit, machine, versions
    made_by: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch < 1:
            raise EvaluationError("--samples and --batch must be at least 1")
        seeds = range(self.seed, self.seed + self.samples)
        if isinstance(self.task, Text):
            if self.chat:
                raise EvaluationError("--chat is for prompts, and task 'text' has none")
            self.encoded = encode_text(self.task, self.tokenizer, seeds)
        else:
            made = [self.task.sample(seed, self._count) for seed in seeds]
            self.encoded = encode(made, self.tokenizer, chat=self.chat)
        self._check_lengths()
        # Rows of one length need no padding, so that DELTA takes them through a layer together.
        self.encoded.sort(key=lambda item: (len(item.prompt), item.sample.seed))
        self._continuations: dict[tuple[int, ...], Tensor] = {}

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _check_lengths(self) -> None:
        positions = longest_prompt(text_config(self.model))
        longest = max(len(item.prompt) + item.max_new_tokens for item in self.encoded)
        if positions is not None and longest > positions:
            raise EvaluationError(
                f"the task needs {longest} tokens of prompt and answer, and the model has "
                f"{positions} positions"
            )

    def trace(self) -> Trace:
        """How long decoding is, for budgets that are solved for a fraction of reads."""
        prompts = [len(item.prompt) for item in self.encoded]
        if isinstance(self.task, Perplexity):
            steps = self.task.tokens - 1
        elif isinstance(self.task, Text):
            steps = self.task.tokens
        else:
            answers = [len(e.reference) or e.max_new_tokens * _TYPICAL_ANSWER for e in self.encoded]
            steps = max(round(float(np.mean(answers))) - 1, 1)
        return Trace(round(float(np.mean(prompts))), max(prompts), steps)

    def settings(self, cell: Cell) -> dict[str, Any]:
        """What decides the results of a cell."""
        return {
            "model": fingerprint(self.model),
            "task": {"name": self.task.name, **options_of(self.task)},
            "policy": cell.policy,
            "budget": cell.budget,
            "seed": self.seed,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "chat": self.chat,
        }

    def path(self, cell: Cell, folder: Path) -> Path:
        """The file of a cell."""
        options = ",".join(f"{key}={value}" for key, value in options_of(self.task).items())
        name = "__".join(slug(part) for part in (self.task.name, options, cell.policy))
        if len(name) > _LONGEST_NAME:
            name = f"{name[:_LONGEST_NAME]}-{digest(name)}"
        return folder / f"{name}__{cell.budget}.jsonl"

    def run(self, cells: Sequence[Cell], folder: Path, progress: Progress) -> list[Records]:
        """Run what the files of the cells lack; gives one file per cell, each with all samples.

        Cells come checked from :func:`deltadecode.lab.evaluation.cells.make_cells`. Raises
        EvaluationError before anything runs when a file is foreign or broken.
        """
        opened, trace = [], self.trace()
        for cell in cells:
            expected = expected_fraction(cell.make(self.model), trace)
            made_by = {**self.made_by, "fraction": cell.fraction, "expected": round(expected, 5)}
            opened.append(Records.open(self.path(cell, folder), self.settings(cell), made_by))
        todo = [
            (cell, records, [e for e in self.encoded if e.sample.seed not in records.samples])
            for cell, records in zip(cells, opened, strict=True)
        ]
        clock = _Clock(
            sum(item.max_new_tokens for _, _, missing in todo for item in missing), progress
        )
        if isinstance(self.task, Text):
            self._run_text(todo, clock)
            return opened
        for cell, records, missing in todo:
            for begin in range(0, len(missing), self.batch):
                part = missing[begin : begin + self.batch]
                label = f"{cell.label}: {begin + len(part)} of {len(missing)}"
                records.add(self._batch(cell, part, clock.of(label, part)))
                clock.finish(part)
        return opened

    def _run_text(self, todo: Sequence[tuple[Cell, Records, list[Encoded]]], clock: _Clock) -> None:
        """One piece after the other, each prepared once for all cells."""
        for number, item in enumerate(self.encoded, 1):
            wanting = [(cell, records) for cell, records, missing in todo if item in missing]
            if not wanting:
                continue
            label = f"piece {number} of {len(self.encoded)}"
            policies = [cell.make(self.model) for cell, _ in wanting]
            measured = text_records(
                self.model, self.tokenizer, policies, item,
                [clock.of(f"{label}: {cell.label}", [item]) for cell, _ in wanting],
            )  # fmt: skip
            for (_, records), record in zip(wanting, measured, strict=True):
                records.add([record])
                clock.finish([item])

    def _batch(
        self, cell: Cell, part: list[Encoded], on_step: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        policy = cell.make(self.model)
        if isinstance(self.task, Perplexity):
            continuation = self._continued(part)
            return teacher_forced_batch(
                self.model, self.tokenizer, policy, part, continuation, on_step
            )
        return solve_batch(
            self.model, self.tokenizer, policy, part, on_step, keep_outputs=self.keep_outputs
        )

    def _continued(self, part: list[Encoded]) -> Tensor:
        """What full attention writes; made once for all policies of a run."""
        key = tuple(item.sample.seed for item in part)
        if key not in self._continuations:
            steps = max(item.max_new_tokens for item in part)
            full = make_policy("full", self.model, 1)
            continuation = new_tokens(
                self.model, self.tokenizer, full, part, steps, lambda step: None
            )
            self._continuations[key] = continuation
        return self._continuations[key]


class _Clock:
    """Work done and seconds left; work is counted in new tokens."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress = max(total, 1), progress
        self._done, self._start = 0, time.monotonic()

    def of(self, label: str, part: Sequence[Encoded]) -> Callable[[int], None]:
        """To be told of each step of a batch."""

        def on_step(step: int) -> None:
            self._tell(label, self._done + sum(min(item.max_new_tokens, step) for item in part))

        return on_step

    def finish(self, part: Sequence[Encoded]) -> None:
        """A batch is done, whatever its rows have left to write."""
        self._done += sum(item.max_new_tokens for item in part)

    def _tell(self, label: str, done: int) -> None:
        taken = time.monotonic() - self._start
        share = done / self._total
        left = taken / share - taken if taken > 1 and share > 0 else None
        self._progress(label, share, left)


def fingerprint(model: Any) -> str:
    """Hash of a model's weights: their shapes, and the first few numbers of each."""
    sha = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in sorted(model.named_parameters()):
        sha.update(f"{name} {tuple(parameter.shape)}".encode())
        few = parameter.detach().flatten()[:8].to(torch.float32).cpu()
        sha.update(few.numpy().tobytes())
    return sha.hexdigest()[:16]
