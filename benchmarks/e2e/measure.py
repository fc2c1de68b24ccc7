"""Stock vLLM and DELTA on the same workloads, in turns or one after the other."""

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.e2e.rows import make_row
from benchmarks.e2e.shapes import ModelShape
from benchmarks.e2e.workloads import BLOCK, Workload, needs
from benchmarks.processes import Process
from benchmarks.report import Progress
from deltadecode.config import DeltaConfig
from deltadecode.lab.results import result

WORKER = (sys.executable, "-m", "benchmarks.e2e.engine")
STOCK, DELTA = "stock", "DELTA"
SIDES = (STOCK, DELTA)
Values = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class RunOptions:
    """What runs and how."""

    shape: ModelShape
    plan: DeltaConfig  # of the DELTA side
    workloads: Sequence[Workload]
    memory_share: float  # of the device, for each engine
    in_turn: bool = False  # one engine after the other; else both live, and rounds alternate
    start_together: bool = False  # with caches of just the size that is needed
    tensor_parallel: int = 1  # ranks of each engine
    sync_heads: bool = False  # of the DELTA side
    worker_process: bool = False  # one for the worker of each engine, even of a single rank
    variables: Mapping[str, str] = field(default_factory=dict)  # of both sides' environment
    command: str = "python -m benchmarks.e2e"  # that repeats it
    worker: Sequence[str] = WORKER

    def spec(self, side: str, model: Path) -> dict[str, Any]:
        """What the process of a side is started with; see :class:`benchmarks.e2e.engine.Engine`."""
        batch, longest = needs(self.workloads)
        return {
            "model": str(model), "batch": batch, "longest": longest,
            "memory_share": self.memory_share, "eager": self.shape.eager,
            "vocabulary": self.shape.vocabulary, **self._drafting(side),
            "kv_cache_dtype": self.workloads[0].kv_cache_dtype,
            "ranks": self.tensor_parallel, "worker_process": self.worker_process,
            "plan": self._settings() if side == DELTA else None,
            # Else an engine takes what is free, less what it sees taken while it starts.
            "kv_bytes": self._kv_bytes() if self.start_together else None,
        }  # fmt: skip

    def _drafting(self, side: str) -> dict[str, Any]:
        one = self.workloads[0]
        stock = one.lossless and side == STOCK
        return {
            "drafts": 0 if stock else one.drafts,
            "lossless": one.lossless and not stock,
            "acceptance": one.acceptance,
        }

    def of_ranks(self) -> dict[str, Any]:
        """What a row says of ranks, where there are several."""
        if self.tensor_parallel == 1:
            return {}
        return {"tensor_parallel": self.tensor_parallel, "sync_heads": self.sync_heads}

    def _settings(self) -> dict[str, Any]:
        return self.plan.to_dict() | ({"sync_heads": True} if self.sync_heads else {})

    def _kv_bytes(self) -> int:
        # vLLM keeps a block to itself, and the size that it gives leaves out what the last block of
        # each sequence does not use.
        tokens = max(one.kv_tokens + (1 + one.batch) * BLOCK for one in self.workloads)
        each = self.shape.kv_bytes(self.workloads[0].kv_cache_dtype)
        return each // min(self.tensor_parallel, self.shape.kv_heads) * tokens


class Measurement:
    """A run, and its result so far, which ``save`` gets after every change."""

    def __init__(
        self, options: RunOptions, save: Callable[[dict[str, Any]], None], progress: Progress
    ) -> None:
        self.options, self.save, self.progress = options, save, progress
        self._values: dict[Workload, Values] = {one: defaultdict(list) for one in options.workloads}
        self._living: list[Process] = []
        shape = options.shape
        # Asked before an engine starts, which measures the memory that others take.
        self.result: dict[str, Any] = {
            **result("e2e", options.command, []),
            "model": shape.name, "parameters": shape.parameters, "plan": options.plan.to_dict(),
            "plan_note": shape.plan_note if options.plan == shape.plan else "given",
            "memory_share": options.memory_share, "in_turn": options.in_turn, **options.of_ranks(),
            "worker_process": options.worker_process, "environment": dict(options.variables),
            "engines": {}, "skipped": [], "one_side": [],
        }  # fmt: skip

    def run(self, folder: Path) -> dict[str, Any]:
        """Measure everything; ``folder`` is for the model's configuration.

        Gives a result with ``engines`` (what each ran with), ``skipped`` (workloads that did not
        fit, and why) and ``one_side`` (what was measured on one side so far). When a process
        fails, its WorkerError is raised; what was measured before is saved.
        """
        model = self.options.shape.write(folder)
        try:
            for sides in [[STOCK], [DELTA]] if self.options.in_turn else [[*SIDES]]:
                engines = self._start(sides, model)
                for workload in self.options.workloads:
                    if self._fits(workload):
                        self._measure(workload, engines)
                for process in engines:
                    process.stop()
                    self._living.remove(process)
        finally:
            for process in self._living:
                process.kill()
        return self.result

    def _start(self, sides: Sequence[str], model: Path) -> list[Process]:
        engines: list[Process] = []
        for side in sides:
            self._tell(f"starting {side}")
            spec = self.options.spec(side, model)
            process = Process(side, spec, self.options.worker, variables=self.options.variables)
            engines.append(process)
            self._living.append(process)
            if not self.options.start_together:
                self._note_ready(process)
        for process in engines:
            if process.side not in self.result["engines"]:
                self._note_ready(process)
        return engines

    def _note_ready(self, process: Process) -> None:
        self.result["engines"][process.side] = process.ready()
        self.save(self.result)

    def _fits(self, workload: Workload) -> bool:
        """Whether both caches hold it; a side that has not started yet is taken to."""
        if any(skipped["case"] == workload.case for skipped in self.result["skipped"]):
            return False
        for side, facts in self.result["engines"].items():
            if facts["kv_tokens"] < workload.kv_tokens:
                have = facts["kv_tokens"]
                why = f"needs {workload.kv_tokens} tokens of KV cache, the {side} engine has {have}"
                self._skip(workload, why)
                return False
        return True

    def _measure(self, workload: Workload, engines: Sequence[Process]) -> None:
        for process in engines:
            self._tell(f"{workload.case}: {process.side}")
            for command in workload.opening():
                self._values[workload][process.side + " opening"].append(process.do(command))
        for _ in range(workload.rounds):
            for process in engines:
                self._tell(f"{workload.case}: {process.side}")
                values = process.do(workload.measuring())
                self._values[workload][process.side].append(values)
        for process in engines:
            for command in workload.closing():
                process.do(command)
        self._collect(workload)
        self.save(self.result)

    def _collect(self, workload: Workload) -> None:
        """Make the row, once both sides are there."""
        values = self._values[workload]
        stock, delta = values.get(STOCK), values.get(DELTA)
        if not (stock and delta):
            self.result["one_side"].append({"case": workload.case, "side": STOCK, "rounds": stock})
            return
        self.result["one_side"] = [
            half for half in self.result["one_side"] if half["case"] != workload.case
        ]
        if workload.kind == "profile" and not (stock[0]["busy_us"] and delta[0]["busy_us"]):
            return self._skip(workload, "the profiler saw nothing run on a GPU")
        opened = [value for side in SIDES for value in values[f"{side} opening"]]
        made = make_row(workload, delta, stock, opened, self.options.plan)
        self.result["rows"].append(made | self.options.of_ranks())

    def _skip(self, workload: Workload, why: str) -> None:
        self.result["skipped"].append({"case": workload.case, "why": why})
        self._tell(f"skipped {workload.case}: {why}")
        self.save(self.result)

    def _tell(self, what: str) -> None:
        sides = sum(
            len(values.get(side, [])) / workload.rounds
            for workload, values in self._values.items()
            for side in SIDES
        )
        self.progress(what, sides / (2 * len(self._values)))
