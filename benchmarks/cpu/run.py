"""The CPU benchmark: one decode step and its memory, stock Transformers beside DELTA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config

from benchmarks.base import ROUNDS, compare
from benchmarks.memory import peak_memory
from benchmarks.report import Progress
from deltadecode.lab.results import result, row
from deltadecode.lab.steptime import PLAN, StepTimer, qwen2_05b

_PEER = "Transformers sdpa + DynamicCache"
_WARMUP = 2
_STEPS = 10
# Where both sides compute nearly the same, a few percent are noise: that many times more steps.
_COVERED_TIMES = 4
# Processes per side of which the lowest peak counts: how the allocator reuses what was freed while
# the model was made varies by several percent from process to process.
_PEAKS = 5
# Dtype, context, and whether the budget covers all pages (DELTA then must not be slower).
StepCases = tuple[tuple[torch.dtype, int, bool], ...]
MemoryCases = tuple[tuple[torch.dtype, int], ...]
STEP_CASES: StepCases = (
    (torch.bfloat16, 16384, False),
    (torch.bfloat16, 32768, False),
    (torch.bfloat16, 16, True),
    (torch.bfloat16, 1024, True),
    (torch.bfloat16, 16384, True),
    (torch.float32, 16384, False),
    (torch.float32, 16, True),
    (torch.float32, 1024, True),
    (torch.float32, 16384, True),
)
MEMORY_CASES: MemoryCases = (
    (torch.bfloat16, 16384),
    (torch.bfloat16, 32768),
    (torch.float32, 16384),
)
QUICK_STEPS: StepCases = ((torch.float32, 2048, False), (torch.float32, 2048, True))
QUICK_MEMORY: MemoryCases = ((torch.float32, 2048),)


def run(
    config: Qwen2Config | None = None,
    step_cases: StepCases = STEP_CASES,
    memory_cases: MemoryCases = MEMORY_CASES,
    *,
    quick: bool = False,
    steps: int = _STEPS,
    peaks: int = _PEAKS,
    command: str = "python -m benchmarks.cpu",
    progress: Progress = lambda case, done: None,
) -> dict[str, Any]:
    """Run the benchmark; see :func:`deltadecode.lab.results.result`.

    Parameters
    ----------
    config : Qwen2Config, optional
        Shape of the random model; by default that of Qwen2.5-0.5B.
    step_cases : tuple
        (dtype, context, whether K ≥ N) of every step to time.
    memory_cases : tuple
        (dtype, context) of every peak to measure.
    quick : bool
        A tiny model and few cases instead.
    steps : int
        Timed steps per case and side, four times as many where K ≥ N; the result is their median.
    peaks : int
        Processes per memory case and side; the result is their lowest peak.
    """
    if quick:
        config, step_cases, memory_cases = quick_shape(), QUICK_STEPS, QUICK_MEMORY
    shape = qwen2_05b() if config is None else config
    work = _Work(len(step_cases) + len(memory_cases), progress)
    rows = [*_time_steps(shape, step_cases, steps, work), *_peaks(shape, memory_cases, peaks, work)]
    return result("cpu", command, rows)


def quick_shape() -> Qwen2Config:
    """A model that takes milliseconds, deep enough for the benchmark's plan."""
    return Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=20,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


def compare_commits(
    commit: str | None,
    folder: Path | None,
    command: str,
    *,
    quick: bool = False,
    rounds: int = ROUNDS,
    progress: Progress = lambda case, done: None,
) -> dict[str, Any]:
    """Time steps of another commit beside ours; see :func:`benchmarks.base.compare`."""
    config = (quick_shape() if quick else qwen2_05b()).to_dict()
    cases = [
        {
            "label": f"{dtype}, context {context}",
            "config": config,
            "dtype": dtype,
            "context": context,
        }
        for dtype, context in dict.fromkeys(
            (_name(case[0]), case[1]) for case in (QUICK_STEPS if quick else STEP_CASES)
        )
    ]
    spec = {"kind": "steps", "unit": "ms", "threads": torch.get_num_threads()}
    rows = list(compare(commit, folder, spec, cases, rounds, progress))
    return result("cpu", command, rows)


class _Work:
    """How much is done, over cases that count alike."""

    def __init__(self, cases: int, progress: Progress) -> None:
        self._cases = cases
        self._progress = progress
        self._done = 0.0
        self._case = ""

    def begin(self, case: str) -> None:
        self._case = case
        self._progress(case, self._done / self._cases)

    def advance(self, part: float) -> None:
        self._done += part
        self._progress(self._case, self._done / self._cases)


def _time_steps(
    shape: Qwen2Config, cases: StepCases, steps: int, work: _Work
) -> Iterator[dict[str, Any]]:
    timer: StepTimer | None = None
    for dtype, context, covered in cases:
        case = f"decode step, {_name(dtype)}, context {context}{', K ≥ N' if covered else ''}"
        work.begin(case)
        if timer is None or timer.dtype != dtype:
            timer = None  # the old weights go before the new ones come
            timer = StepTimer(shape, dtype)
        count = steps * _COVERED_TIMES if covered else steps
        # In K ≥ N cases the budget covers the tokens that the timed steps add as well.
        pages = -(-(context + count + _WARMUP) // PLAN.page_size)
        budget = max(PLAN.budget_pages, pages) if covered else PLAN.budget_pages
        found = timer.measure(
            context,
            replace(PLAN, budget_pages=budget),
            steps=count,
            warmup=_WARMUP,
            on_step=partial(work.advance, 1 / (count + _WARMUP)),
        )
        yield row(case, _PEER, "ms", found.delta_ms, found.full_ms, budget_pages=budget)


def _peaks(
    shape: Qwen2Config, cases: MemoryCases, peaks: int, work: _Work
) -> Iterator[dict[str, Any]]:
    for dtype, context in cases:
        case = f"peak memory, {_name(dtype)}, context {context}"
        work.begin(case)
        delta: list[float] = []
        full: list[float] = []
        for _ in range(peaks):
            delta.append(peak_memory("delta", shape, context, dtype, PLAN))
            work.advance(0.5 / peaks)
            full.append(peak_memory("full", shape, context, dtype, PLAN))
            work.advance(0.5 / peaks)
        yield row(
            case, _PEER, "MiB", min(delta), min(full),
            budget_pages=PLAN.budget_pages, runs_ours=delta, runs_theirs=full,
        )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
