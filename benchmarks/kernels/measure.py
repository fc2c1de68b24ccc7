"""Measures the shapes of the kernel benchmark, with whatever times and whoever is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.cases import (
    BLOCK_SIZE,
    CFG,
    DIM,
    SELECT_FIXED,
    Shape,
    error_shapes,
    moved_bytes,
)
from benchmarks.kernels.inputs import (
    SCALE,
    Inputs,
    exact_attention,
    inputs_bytes,
    make_inputs,
    relative_error,
)
from benchmarks.kernels.peers import TOPK, Peer, topk_select
from benchmarks.kernels.rows import OURS, attention_rows, error_rows, select_row
from benchmarks.kernels.timing import Bandwidth, Call, Runner, Timer
from deltadecode import ops
from deltadecode.lab.results import reason, result

_ERROR_SEQUENCES = 4
# Name of what runs now, and how much of all work is done.
Progress = Callable[[str, float], None]


@dataclass
class Bench:
    """What the measurements of one run share.

    Attributes
    ----------
    timer : Timer
        Times calls.
    bandwidth : Bandwidth
        Of the device.
    device : torch.device
        Where it runs.
    backend : str
        Maker of our operations.
    l2_bytes, memory_limit : int
        L2 cache of the device, and what inputs may take of its memory, in bytes.
    peers : list of Peer
        Those that run; one that fails leaves the list.
    missing : dict
        Peer -> why it does not run.
    skipped : list of dict
        Shapes that were not measured, and why.
    """

    timer: Timer
    bandwidth: Bandwidth
    device: torch.device
    backend: str
    l2_bytes: int
    memory_limit: int
    peers: list[Peer] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def skip(self, shape: Shape, why: str) -> None:
        """Note that a shape, or a peer at a shape, was not measured."""
        self.skipped.append({"case": shape.label, "reason": why})


@torch.inference_mode()
def measure(
    bench: Bench, shapes: Sequence[Shape], command: str, progress: Progress
) -> dict[str, Any]:
    """Measure all shapes.

    Parameters
    ----------
    bench : Bench
        What to measure with; gets what was skipped, and loses peers that fail.
    shapes : sequence of Shape
        What to measure.
    command : str
        That repeats it.
    progress : callable
        Told the case that runs and the part of all work that is done.

    Returns
    -------
    dict
        See :func:`deltadecode.lab.results.result`; and ``bandwidth``, ``settings``,
        ``peers_missing`` and ``skipped``.
    """
    rows: list[dict[str, Any]] = []
    fitting = [shape for shape in shapes if _fits(bench, shape)]
    with_errors = error_shapes(fitting)
    for done, shape in enumerate(fitting):
        progress(shape.label, done / (len(fitting) + 1))
        try:
            rows += _attention(bench, shape, shape in with_errors)
        except torch.OutOfMemoryError as error:
            bench.skip(shape, reason(error))
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    sizes = dict.fromkeys([SELECT_FIXED, *((shape.batch, shape.pages) for shape in fitting)])
    progress("select", len(fitting) / (len(fitting) + 1))
    rows += [_select(bench, batch, pages) for batch, pages in sizes]
    progress("select", 1.0)
    return {
        **result("kernels", command, rows),
        "bandwidth": {
            "copy_tb_s": round(bench.bandwidth.copy / 1e12, 3),
            "read_tb_s": round(bench.bandwidth.read / 1e12, 3),
        },
        "settings": {
            "dtype": "bfloat16",
            "head_dim": DIM,
            "page_size": CFG.page_size,
            "budget_pages": CFG.budget_pages,
            "recent_pages": CFG.recent_pages,
            "block_size": BLOCK_SIZE,
            "l2_bytes": bench.l2_bytes,
            "memory_limit_gib": round(bench.memory_limit / 2**30, 1),
        },
        "peers_missing": bench.missing,
        "skipped": bench.skipped,
    }


def _fits(bench: Bench, shape: Shape) -> bool:
    needed = inputs_bytes(shape, bench.l2_bytes)
    if needed > bench.memory_limit:
        bench.skip(
            shape,
            f"inputs of {needed / 2**30:.1f} GiB exceed the limit of "
            f"{bench.memory_limit / 2**30:.1f} GiB",
        )
    return needed <= bench.memory_limit


def _attention(bench: Bench, shape: Shape, errors: bool) -> list[dict[str, Any]]:
    inputs = make_inputs(shape, bench.device, bench.l2_bytes)
    calls: dict[tuple[str, str], Sequence[Call]] = {
        (op, OURS): ours for op, ours in our_calls(inputs, bench.backend).items()
    }
    runners: dict[tuple[str, str], Runner] = {
        (op, side): bench.timer.prepare(todo, moved_bytes(op, shape))
        for (op, side), todo in calls.items()
    }
    for peer in list(bench.peers):
        for op, todo, runner in _peer_runners(bench, peer, inputs):
            calls[op, peer.name] = todo
            runners[op, peer.name] = runner
    timings = bench.timer.measure(runners)
    sets = {op: len(todo) for (op, side), todo in calls.items() if side == OURS}
    rows = attention_rows(shape, timings, sets, bench.bandwidth)
    if errors:
        rows += error_rows(shape, _errors(inputs, calls))
    return rows


def our_calls(inputs: Inputs, backend: str) -> dict[str, list[Call]]:
    """Prepare calls of our operations.

    Parameters
    ----------
    inputs : Inputs
        The inputs.
    backend : str
        Backend of the operations.

    Returns
    -------
    dict
        ``"dense"``, ``"scores"``, ``"delta"`` and ``"sparse"`` -> one call per input set, which
        gives the output [B, Hq, D]; ``"scores"`` (output, page scores), and ``"delta"`` (output,
        page ids, page counts).
    """

    def attend(cache: tuple[Tensor, Tensor], **options: Any) -> Any:
        return ops.decode_attention(
            inputs.q,
            *cache,
            inputs.block_table,
            inputs.seq_lens,
            scale=SCALE,
            page_size=CFG.page_size,
            backend=backend,
            **options,
        )

    def delta(cache: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        out, page_scores = attend(cache, return_page_scores=True)
        return out, *ops.select_pages(page_scores, inputs.seq_lens, CFG, backend=backend)

    return {
        "dense": [partial(attend, cache) for cache in inputs.caches],
        "scores": [partial(attend, cache, return_page_scores=True) for cache in inputs.caches],
        "delta": [partial(delta, cache) for cache in inputs.caches],
        "sparse": [
            partial(
                attend,
                inputs.caches[number],
                page_ids=chosen.page_ids,
                page_counts=chosen.page_counts,
            )
            for number, chosen in inputs.sparse
        ],
    }


def _peer_runners(
    bench: Bench, peer: Peer, inputs: Inputs
) -> Iterator[tuple[str, Sequence[Call], Runner]]:
    for op in peer.ops:
        try:
            todo = peer.calls(op, inputs)
            yield op, todo, bench.timer.prepare(todo, moved_bytes(op, inputs.shape))
        except torch.OutOfMemoryError as error:
            bench.skip(inputs.shape, f"{peer.name}, {op}: {reason(error)}")
        except Exception as error:  # a peer that cannot run here must not end the run
            bench.peers.remove(peer)
            bench.missing[peer.name] = f"{op}, {inputs.shape.label}: {reason(error)}"
            return


def _errors(
    inputs: Inputs, calls: dict[tuple[str, str], Sequence[Call]]
) -> dict[tuple[str, str], float]:
    """Errors of all sides, and under the name ``""`` that of the exact result in bfloat16."""
    found: dict[tuple[str, str], float] = {}
    for op in ("dense", "sparse"):
        exact = exact_attention(inputs, _ERROR_SEQUENCES, sparse=op == "sparse")
        found[op, ""] = relative_error(exact.to(inputs.q.dtype), exact)
        for (of, side), todo in calls.items():
            if of == op:
                found[op, side] = relative_error(todo[0](), exact)
    return found


def _select(bench: Bench, batch: int, pages: int) -> dict[str, Any]:
    scores = torch.rand((batch, pages), device=bench.device)
    lens = torch.full((batch,), pages * CFG.page_size, dtype=torch.int32, device=bench.device)
    sides: dict[str, Call] = {
        OURS: partial(ops.select_pages, scores, lens, CFG, backend=bench.backend),
        TOPK: partial(topk_select, scores),
    }
    # One input set: a Δ-layer has just written the scores, so they are in the cache.
    runners = {side: bench.timer.prepare([call], scores.nbytes) for side, call in sides.items()}
    return select_row(batch, pages, bench.timer.measure(runners))
