"""Decode steps of one model from each kind of cache, and the longest context that each can hold."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import mean, median, quantiles
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import deltadecode as dd
from benchmarks.e2e.shapes import ModelShape
from benchmarks.memory.caches import (
    NO_ROOM,
    PEERS,
    STOCK_OFFLOADED,
    WARMUP,
    Kind,
    fill,
    free_all,
    held_bytes,
    kinds,
    reason,
)
from benchmarks.memory.prompts import prompt_rows
from benchmarks.memory.rows import MEASURED, RANDOM, longest_row, point_rows
from benchmarks.memory.selections import Walk
from benchmarks.report import Progress
from deltadecode.config import DeltaConfig
from deltadecode.engines.transformers.offload_host import free_host_bytes
from deltadecode.lab.results import result, rounded

_SECONDS = 5.0  # of the steps of one cache, once there are two
# Activations, workspaces and what is lost between blocks.
_RESERVE = 2**30
# Host memory that the rest of the process may take meanwhile.
_HOST_RESERVE = 2 * 2**30


@dataclass
class Options:
    """What is measured.

    ``missed`` is the record that selections follow, of which ``selections`` names the source;
    ``longest`` are the sizes of GPUs in GB (10^9 bytes) to find the longest context for;
    ``kv_dtype`` is that of DELTA's own caches. Every cache has ``rounds`` turns, and ``steps`` in
    each of them. ``layer_graphs`` is for steps from DELTA's own caches. With ``prompt_chunk``
    prompts go through the model in chunks of so many tokens, and no steps are timed from filled
    caches; without ``gather`` the CPU gathers the pages that an offloaded cache fetches. ``peers``
    are those of `benchmarks.memory.caches.PEERS` that are measured, too.
    """

    shape: ModelShape
    plan: DeltaConfig
    batches: Sequence[int]
    contexts: Sequence[int]
    steps: int
    command: str
    missed: list[list[int]] | None = None
    selections: dict[str, Any] = field(default_factory=dict)
    longest: Sequence[float] = ()
    kv_dtype: str | None = None
    rounds: int = 1
    layer_graphs: bool = False
    prompt_chunk: int | None = None
    gather: bool = True
    peers: Sequence[str] = tuple(PEERS)


class Bench:
    """A model with random weights, and the caches that it decodes from."""

    def __init__(self, options: Options) -> None:
        self.options, shape = options, options.shape
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        self.dtype = torch.bfloat16 if cuda else torch.float32
        # Kernels and rotations ask for no more positions than there are.
        config = {**shape.config(), "max_position_embeddings": 1 << 23}
        self.config = AutoConfig.for_model(**config)
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(
                self.config, attn_implementation="sdpa", dtype=self.dtype
            )
        self.model = model.eval()
        self.kinds = kinds(shape, options.plan, options.kv_dtype, options.gather, options.peers)

    @property
    def like(self) -> Tensor:
        """Of the type and on the device of the caches."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    def measure(self, kind: Kind, batch: int, context: int, turn: int = 0) -> dict[str, Any]:
        """Fill a cache and time steps of it, that end with ``context`` tokens or little less.

        Gives ``why`` where it does not fit, else bytes, and for each way to select pages the times
        in ms and, of an offloaded cache, what was fetched. ``turn`` counts those of this kind.
        """
        free_all()
        modes = [RANDOM] if self.options.missed is None or not kind.is_ours else [RANDOM, MEASURED]
        # PyTorch's cuDNN attention keeps a plan for each length. So every turn has lengths of its
        # own: else the first one would make the plans that the others find.
        turns_before = turn * len(self.kinds) + self.kinds.index(kind)
        end = context - turns_before * _lengths(self.options)
        tokens = end - len(modes) * (WARMUP + self.options.steps)
        why = kind.refused(batch, context, self.device)
        if why is not None:
            return {"why": why}
        self.switch(kind)
        before = self._allocated()
        try:
            began = time.perf_counter()
            cache = kind.make(self.config, self.device)
            fill(cache, self.options.shape, self.like, batch, tokens)
            self._synchronize()
            seconds = round(time.perf_counter() - began, 2)
            found: dict[str, Any] = {"tokens": end, "fill_s": seconds}
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for mode in modes:
                found[mode] = self._steps(kind, cache, batch, mode)
            held = held_bytes(cache, self.device)
            peak = held.gpu
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() - before
            return found | {"gpu_bytes": held.gpu, "gpu_peak": peak, "host_bytes": held.host}
        except NO_ROOM as error:
            return {"why": reason(error)}
        finally:
            cache = None
            free_all()

    def holds(self, kind: Kind, batch: int, tokens: int) -> str | None:
        """Fill a cache with so many tokens and decode two more; None, or why it could not."""
        free_all()
        self.switch(kind)
        try:
            cache = kind.make(self.config, self.device)
            fill(cache, self.options.shape, self.like, batch, tokens - 2)
            for _ in range(2):
                self._step(cache, batch)
            self._synchronize()
        except NO_ROOM as error:
            return reason(error)
        else:
            return None
        finally:
            cache = None
            free_all()

    def _steps(self, kind: Kind, cache: Any, batch: int, mode: str) -> dict[str, Any]:
        steps, missed = self.options.steps, self.options.missed
        leading: Any = nullcontext()
        if mode == MEASURED and missed is not None:
            leading = Walk(
                missed, self.options.plan, layers=len(self.options.plan.delta_layers), batch=batch,
                first=cache.get_seq_length() + 1, steps=WARMUP + steps, device=self.device,
            ).leading()  # fmt: skip
        times: list[float] = []
        with leading:
            for step in range(WARMUP + steps):
                if step == WARMUP and kind.is_ours:
                    dd.stats(self.model).reset()
                seconds = self._step(cache, batch)
                if step >= WARMUP:
                    times.append(1e3 * seconds)
                # A slow cache would take minutes.
                if len(times) > 1 and sum(times) > 1e3 * _SECONDS:
                    break
        found: dict[str, Any] = {"times": times}
        if kind.is_ours and isinstance(cache, dd.DeltaOffloadedCache):
            stats = dd.stats(self.model).offload
            found["hit_rate"] = stats.hit_rate
            found["fetched_bytes"] = stats.fetched_bytes_per_step
        return found

    @torch.no_grad()
    def _step(self, cache: Any, batch: int) -> float:
        # Another token at each step, so that queries differ.
        tokens = torch.randint(self.options.shape.vocabulary, (batch, 1), device=self.device)
        self._synchronize()
        began = time.perf_counter()
        self.model(tokens, past_key_values=cache, logits_to_keep=1)
        self._synchronize()
        return time.perf_counter() - began

    def switch(self, kind: Kind) -> None:
        """Have the model decode as this kind of cache is for."""
        if kind.is_ours:
            dd.enable(self.model, self.options.plan, layer_graphs=self.options.layer_graphs)
        else:
            dd.disable(self.model)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _lengths(options: Options) -> int:
    """Lengths that a cache decodes at in one turn, at most: with both ways to select pages."""
    return 2 * (WARMUP + options.steps)


def join_turns(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One measurement of all turns of a kind of cache, with times of all their steps.

    A virtual machine may be slow for seconds. ``rounds`` has the median of each turn.
    """
    joined = dict(turns[0])
    for turn in turns:
        if "why" in turn:
            return turn
    for mode in (MEASURED, RANDOM):
        parts = [turn[mode] for turn in turns if mode in turn]
        times = [time for part in parts for time in part["times"]]
        if not times:
            continue
        tenths = quantiles(times, n=10) if len(times) > 1 else times * 9
        joined[mode] = {
            "ms": median(times), "p10": tenths[0], "p90": tenths[-1], "steps": len(times),
            "rounds": [rounded(median(part["times"])) for part in parts],
        }  # fmt: skip
        if "hit_rate" in parts[0]:
            joined[mode]["hit_rate"] = round(mean(part["hit_rate"] for part in parts), 4)
            fetched = mean(part["fetched_bytes"] for part in parts)
            joined[mode]["fetched_bytes"] = round(fetched)
    return joined


def run(options: Options, progress: Progress = lambda case, done: None) -> dict[str, Any]:
    """Measure every batch and context from every kind of cache, then the longest contexts.

    With ``prompt_chunk``, a prompt of every context instead.

    Raises
    ------
    ValueError
        For a context that is too short for the lengths of all kinds.
    """
    turns = options.rounds * (1 + len(options.peers))
    least = turns * _lengths(options) + 1
    if options.prompt_chunk is None and min(options.contexts) < least:
        raise ValueError(
            f"--context must be at least {least} tokens for {options.rounds} rounds of "
            f"{options.steps} steps of every cache, got {min(options.contexts)}"
        )
    progress("make the model", 0.0)
    bench = Bench(options)
    rows, skipped = _prompts(bench, progress) if options.prompt_chunk else _points(bench, progress)
    for size in options.longest:
        rows += _longest(bench, size, lambda case: progress(case, 1.0))
    shape = options.shape
    return result("memory", options.command, rows) | {
        "model": shape.name, "plan": options.plan.to_dict(), "plan_note": shape.plan_note,
        "kv_dtype": options.kv_dtype, "layer_graphs": options.layer_graphs,
        "gather": options.gather, "selections": options.selections, "skipped": skipped,
    }  # fmt: skip


Found = tuple[list[dict[str, Any]], list[dict[str, str]]]  # rows, and what was left out


def _points(bench: Bench, progress: Progress) -> Found:
    options = bench.options
    points = [(batch, context) for batch in options.batches for context in options.contexts]
    parts = max(1, len(points) * options.rounds * len(bench.kinds))
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    done = 0
    for batch, context in points:
        found: dict[str, list[dict[str, Any]]] = {kind.name: [] for kind in bench.kinds}
        for turn in range(options.rounds):
            # There and back again, so that no kind is always the first.
            for kind in bench.kinds[:: -1 if turn % 2 else 1]:
                progress(f"batch {batch}, {context:,} tokens: {kind.name}", done / parts)
                found[kind.name].append(bench.measure(kind, batch, context, turn))
                done += 1
        joined = {name: join_turns(each) for name, each in found.items()}
        made, left = point_rows(joined, batch, context)
        rows += made
        skipped += left
    return rows, skipped


def _prompts(bench: Bench, progress: Progress) -> Found:
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for done, tokens in enumerate(bench.options.contexts):
        progress(f"a prompt of {tokens:,} tokens", done / len(bench.options.contexts))
        made, left = prompt_rows(bench, tokens)
        rows += made
        skipped += left
    return rows, skipped


def _longest(bench: Bench, size: float, show: Any) -> list[dict[str, Any]]:
    """Most tokens of one sequence beside the weights on a GPU of ``size`` GB, for each kind.

    Worked out from bytes, with 1 GiB for all else. Each but Transformers' offloaded cache, whose
    steps take too long, is then held once, on a GPU that may use no more than that.
    """
    weights = sum(weight.nbytes for weight in bench.model.parameters())
    gpu = int(size * 1e9) - weights - _RESERVE
    free = free_host_bytes()
    host = None if free is None else max(0, free - _HOST_RESERVE)
    found = {}
    cuda = bench.device.type == "cuda"
    if cuda:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size * 1e9 / whole))
    try:
        for kind in bench.kinds:
            tokens = kind.longest(1, gpu, host)
            known: dict[str, Any] = {
                "tokens": tokens, "by_gpu": kind.longest(1, gpu, None),
                "host_bytes": kind.needs(1, tokens).host, "why": None, "held": False,
            }  # fmt: skip
            if kind.name != STOCK_OFFLOADED and tokens > 2:
                show(f"{size:g} GB, {tokens:,} tokens: {kind.name}")
                known["why"] = bench.holds(kind, 1, tokens)
                known["held"] = known["why"] is None
            found[kind.name] = known
    finally:
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
    return longest_row(found, size, host)
