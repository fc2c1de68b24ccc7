"""The end-to-end benchmark: stock vLLM and the same engine with DELTA, on the same workloads."""

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import command_line
from benchmarks.e2e.measure import Measurement, RunOptions
from benchmarks.e2e.shapes import find_shape
from benchmarks.e2e.workloads import parse_point, workloads
from benchmarks.report import Progress
from benchmarks.variables import parse_variables
from deltadecode.cli.output import BadInput
from deltadecode.config import DeltaConfig
from deltadecode.lab.results import write_result

# Two engines leave room for graphs and for what a process takes outside of its share.
SHARE_OF_TWO = 0.42
_SHARE_OF_ONE = 0.85


def make_options(
    *,
    shape: str = "r1-1.5b",
    kinds: Sequence[str] = (),
    points: Sequence[str] = (),
    steps: int = 64,
    rounds: int | None = None,
    plan: Path | None = None,
    memory_share: float | None = None,
    in_turn: bool = False,
    start_together: bool = False,
    drafts: int = 0,
    kv_cache_dtype: str = "auto",
    tensor_parallel: int = 1,
    sync_heads: bool = False,
    worker_process: bool = False,
    lossless: bool = False,
    acceptance: float | None = None,
    variables: Sequence[str] = (),
) -> RunOptions:
    """Check what was asked for; a ValueError for what cannot be.

    ``kinds`` and ``points`` (``batch:context``) say what to measure, ``memory_share`` is of the
    device for each engine: by default 0.42, or 0.85 in turn. ``drafts`` are verified in each step,
    ``kv_cache_dtype`` is that of both engines. ``tensor_parallel`` ranks hold either model, and
    select together with ``sync_heads``; with ``worker_process`` even a single rank has a process of
    its own. ``variables`` are ``NAME=VALUE``, of both sides.
    """
    model = find_shape(shape)
    for name, value in (("steps", steps), ("rounds", rounds)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    share = memory_share or (_SHARE_OF_ONE if in_turn else SHARE_OF_TWO)
    if not 0.0 < share * (1 if in_turn else 2) <= 1.0:
        most = "1" if in_turn else "0.5, or --in-turn given"
        raise ValueError(f"memory share must be above 0 and at most {most}, got {share}")
    if in_turn and start_together:
        raise ValueError("--in-turn starts one engine after the other; got --start-together too")
    if tensor_parallel < 1 or model.heads % tensor_parallel:
        raise ValueError(
            f"tensor parallel must divide {model.name}'s {model.heads} heads, got {tensor_parallel}"
        )
    if sync_heads and tensor_parallel == 1:
        raise ValueError("--sync-heads needs --tensor-parallel of at least 2, got 1")
    chosen = workloads(
        kinds, [parse_point(p) for p in points], steps=steps, rounds=rounds, drafts=drafts,
        kv_cache_dtype=kv_cache_dtype, lossless=lossless, acceptance=acceptance,
    )  # fmt: skip
    longest = max(chosen, key=lambda one: one.longest)
    if longest.longest > model.positions:
        raise ValueError(
            f"context must fit {model.name}'s {model.positions} positions with "
            f"{longest.longest - longest.context} tokens to spare, got {longest.context}"
        )
    cfg = model.plan if plan is None else DeltaConfig.load(plan)
    cfg.layer_plan(model.layers)
    command = command_line(
        "e2e", shape=shape, workload=list(kinds), point=list(points), steps=steps, rounds=rounds,
        plan=plan, memory_share=memory_share, in_turn=in_turn, start_together=start_together,
        drafts=drafts or None, lossless=lossless, acceptance=acceptance,
        kv_cache_dtype=None if kv_cache_dtype == "auto" else kv_cache_dtype,
        tensor_parallel=tensor_parallel if tensor_parallel > 1 else None, sync_heads=sync_heads,
        worker_process=worker_process, env=list(variables),
    )  # fmt: skip
    return RunOptions(
        model, cfg, chosen, share, in_turn, start_together, tensor_parallel, sync_heads,
        worker_process, parse_variables(variables), command,
    )  # fmt: skip


def has_vllm() -> bool:
    """Whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


def need_vllm() -> None:
    """Refuse with a BadInput to go on without vLLM."""
    if not has_vllm():
        raise BadInput("vLLM is not installed: pip install 'deltadecode[vllm]'")


def run(
    options: RunOptions,
    *,
    out: Path | None = None,
    tag: str | None = None,
    progress: Progress = lambda case, done: None,
) -> dict[str, Any]:
    """Run the benchmark; see :meth:`benchmarks.e2e.measure.Measurement.run`.

    The result file in ``out`` is written again after every measurement.
    """

    def save(result: dict[str, Any]) -> None:
        if out is not None:
            write_result(result, out, tag)

    with tempfile.TemporaryDirectory(prefix="deltadecode-") as folder:
        return Measurement(options, save, progress).run(Path(folder) / options.shape.name)
