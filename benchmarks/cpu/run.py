"""The CPU benchmark: one decode step and its memory, stock Transformers beside DELTA."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config

from benchmarks.base import ROUNDS, compare
from benchmarks.process_memory import Side, peak_memory
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
_BF16, _F32 = torch.bfloat16, torch.float32
STEP_CASES: StepCases = (
    *((_BF16, context, False) for context in (16384, 32768)),
    *((_BF16, context, True) for context in (16, 1024, 16384)),
    (_F32, 16384, False),
    *((_F32, context, True) for context in (16, 1024, 16384)),
)
MEMORY_CASES: MemoryCases = ((_BF16, 16384), (_BF16, 32768), (_F32, 16384))
QUICK_STEPS: StepCases = ((_F32, 2048, False), (_F32, 2048, True))
QUICK_MEMORY: MemoryCases = ((_F32, 2048),)


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

    A step is the median of ``steps`` timed ones (four times as many where K ≥ N), a peak the lowest
    of ``peaks`` processes. The random model has the shape of Qwen2.5-0.5B unless another is given.
    """
    if quick:
        config, step_cases, memory_cases = quick_shape(), QUICK_STEPS, QUICK_MEMORY
    shape = qwen2_05b() if config is None else config
    done = 0.0

    def advance(case: str, part: float) -> None:
        nonlocal done
        done += part / (len(step_cases) + len(memory_cases))
        progress(case, done)

    rows = [*_time_steps(shape, step_cases, steps, advance)]
    rows += _peaks(shape, memory_cases, peaks, advance)
    return result("cpu", command, rows)


def quick_shape() -> Qwen2Config:
    """A model that takes milliseconds, deep enough for the benchmark's plan."""
    return Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=20,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        tie_word_embeddings=True,
    )  # fmt: skip


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
    chosen = dict.fromkeys((_name(d), n) for d, n, _ in (QUICK_STEPS if quick else STEP_CASES))
    cases = [
        {"label": f"{dtype}, context {n}", "config": config, "dtype": dtype, "context": n}
        for dtype, n in chosen
    ]
    spec = {"kind": "steps", "unit": "ms", "threads": torch.get_num_threads()}
    return result("cpu", command, [*compare(commit, folder, spec, cases, rounds, progress)])


def _time_steps(
    shape: Qwen2Config, cases: StepCases, steps: int, advance: Progress
) -> Iterator[dict[str, Any]]:
    timer: StepTimer | None = None
    for dtype, context, covered in cases:
        case = f"decode step, {_name(dtype)}, context {context}{', K ≥ N' if covered else ''}"
        advance(case, 0.0)
        if timer is None or timer.dtype != dtype:
            timer = None  # the old weights go before the new ones come
            timer = StepTimer(shape, dtype)
        count = steps * _COVERED_TIMES if covered else steps
        # In K ≥ N cases the budget covers the tokens that the timed steps add as well.
        pages = -(-(context + count + _WARMUP) // PLAN.page_size)
        budget = max(PLAN.budget_pages, pages) if covered else PLAN.budget_pages
        cfg = replace(PLAN, budget_pages=budget)
        on_step = partial(advance, case, 1 / (count + _WARMUP))
        times = timer.measure(context, cfg, steps=count, warmup=_WARMUP, on_step=on_step)
        yield row(case, _PEER, "ms", times.delta_ms, times.full_ms, budget_pages=budget)


def _peaks(
    shape: Qwen2Config, cases: MemoryCases, peaks: int, advance: Progress
) -> Iterator[dict[str, Any]]:
    for dtype, context in cases:
        case = f"peak memory, {_name(dtype)}, context {context}"
        advance(case, 0.0)
        runs: dict[Side, list[float]] = {"delta": [], "full": []}
        for _ in range(peaks):
            for side, mib in runs.items():
                mib.append(peak_memory(side, shape, context, dtype, PLAN))
                advance(case, 0.5 / peaks)
        yield row(
            case, _PEER, "MiB", min(runs["delta"]), min(runs["full"]),
            budget_pages=PLAN.budget_pages, runs_ours=runs["delta"], runs_theirs=runs["full"],
        )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
