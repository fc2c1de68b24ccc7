"""Measures the shapes of the kernel benchmark, with whatever times and whoever is there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.kernels.cases import (
    BLOCK_SIZE,
    CFG,
    DIM,
    SELECT_FIXED,
    Shape,
    error_shapes,
    moved_bytes,
)
from benchmarks.kernels.inputs import Inputs, errors, inputs_bytes, make_inputs, our_calls
from benchmarks.kernels.peers import TOPK, Peer, topk_select
from benchmarks.kernels.rows import OURS, attention_rows, error_rows
from benchmarks.kernels.timing import Bandwidth, Call, GraphTimer, Runner
from benchmarks.report import Progress, reason
from deltadecode import ops
from deltadecode.lab.results import result, row


@dataclass
class Bench:
    """What the measurements of one run share."""

    timer: GraphTimer
    bandwidth: Bandwidth
    device: torch.device
    backend: str  # of our operations
    l2_bytes: int
    memory_limit: int  # bytes that inputs may take
    peers: list[Peer] = field(default_factory=list)  # one that fails leaves the list
    missing: dict[str, str] = field(default_factory=dict)  # peer -> why it does not run
    skipped: list[dict[str, Any]] = field(default_factory=list)  # shapes, and why

    def skip(self, shape: Shape, why: str) -> None:
        """Note that a shape, or a peer at a shape, was not measured."""
        self.skipped.append({"case": shape.label, "reason": why})


@torch.inference_mode()
def measure(
    bench: Bench, shapes: Sequence[Shape], command: str, progress: Progress
) -> dict[str, Any]:
    """Measure all shapes.

    Gives :func:`deltadecode.lab.results.result`, and ``bandwidth``, ``settings``,
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
            "dtype": "bfloat16", "head_dim": DIM, "page_size": CFG.page_size,
            "budget_pages": CFG.budget_pages, "recent_pages": CFG.recent_pages,
            "block_size": BLOCK_SIZE, "l2_bytes": bench.l2_bytes,
            "memory_limit_gib": round(bench.memory_limit / 2**30, 1),
        },
        "peers_missing": bench.missing,
        "skipped": bench.skipped,
    }  # fmt: skip


def _fits(bench: Bench, shape: Shape) -> bool:
    needed = inputs_bytes(shape, bench.l2_bytes)
    if needed > bench.memory_limit:
        gib, limit = needed / 2**30, bench.memory_limit / 2**30
        bench.skip(shape, f"inputs of {gib:.1f} GiB exceed the limit of {limit:.1f} GiB")
    return needed <= bench.memory_limit


def _attention(bench: Bench, shape: Shape, with_errors: bool) -> list[dict[str, Any]]:
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
    if with_errors:
        rows += error_rows(shape, errors(inputs, calls))
    return rows


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


def _select(bench: Bench, batch: int, pages: int) -> dict[str, Any]:
    scores = torch.rand((batch, pages), device=bench.device)
    lens = torch.full((batch,), pages * CFG.page_size, dtype=torch.int32, device=bench.device)
    sides: dict[str, Call] = {
        OURS: partial(ops.select_pages, scores, lens, CFG, backend=bench.backend),
        TOPK: partial(topk_select, scores),
    }
    # One input set: a Δ-layer has just written the scores, so they are in the cache.
    runners = {side: bench.timer.prepare([call], scores.nbytes) for side, call in sides.items()}
    timings = bench.timer.measure(runners)
    ours, theirs = timings[OURS], timings[TOPK]
    return row(
        f"select, {batch} rows of {pages} pages", TOPK, "us", ours.us, theirs.us,
        op="select", batch=batch, pages=pages, graph_ours=ours.graph, graph=theirs.graph,
    )  # fmt: skip
