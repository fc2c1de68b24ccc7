"""Time on a CUDA GPU: calls in CUDA graphs, several sides in turns, and the memory's bandwidth."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch

from benchmarks.kernels.cases import calls_per_graph

_WARMUP = 5
_REPLAYS = 25
_COPY_BYTES = 2 * 2**30
Key = TypeVar("Key", bound=Hashable)
Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Median time of one call in microseconds, and whether it ran in a CUDA graph.

    If not, launching it may be part of its time.
    """

    us: float
    graph: bool


@dataclass(frozen=True)
class Runner:
    """Something to time: runs ``calls`` calls at once, as one CUDA graph or one by one."""

    run: Call
    calls: int
    graph: bool


@dataclass(frozen=True)
class Bandwidth:
    """Of the device's memory, in bytes per second: of a copy (both ways) and of a sum (read)."""

    copy: float
    read: float


class GraphTimer:
    """Times CUDA graphs by events on the device."""

    def prepare(self, calls: Sequence[Call], call_bytes: int) -> Runner:
        """Warm up, then capture; plain calls, where capture fails.

        Calls are the same operation, one per input set. ``call_bytes``, which one of them moves,
        tells how many are worth timing. What a call raises outside of capture is raised.
        """
        count = calls_per_graph(call_bytes, len(calls))
        # Compiling, tuning and first allocations cannot be captured; a side stream, as the
        # capture will have one.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()

        def run() -> None:
            for i in range(count):
                calls[i % len(calls)]()

        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as error:
            # A capture that fails can leave its own stream behind as the current one.
            torch.cuda.set_stream(stream)
            torch.cuda.synchronize()
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return Runner(run, count, graph=False)
        return Runner(graph.replay, count, graph=True)

    def measure(self, runners: Mapping[Key, Runner]) -> dict[Key, Timing]:
        """Time them in turns, so that a change of clocks meets all alike.

        Medians over 25 replays, after 5 others.
        """
        event = partial(torch.cuda.Event, enable_timing=True)
        spans: dict[Key, list[tuple[torch.cuda.Event, torch.cuda.Event]]]
        spans = {key: [] for key in runners}
        for turn in range(_WARMUP + _REPLAYS):
            for key, runner in runners.items():
                span = event(), event()
                span[0].record()
                runner.run()
                span[1].record()
                if turn >= _WARMUP:
                    spans[key].append(span)
        torch.cuda.synchronize()
        ms = {key: median(a.elapsed_time(b) for a, b in pairs) for key, pairs in spans.items()}
        return {
            key: Timing(1000 * ms[key] / runner.calls, runner.graph)
            for key, runner in runners.items()
        }


def measure_bandwidth(device: torch.device) -> Bandwidth:
    """Measure by 2 GiB each, many times the caches; the device needs 4 GiB free."""
    source = torch.zeros(_COPY_BYTES // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    timer = GraphTimer()
    runners = {
        # By a kernel: as a graph's node a copy runs on a copy engine, which is slower.
        "copy": timer.prepare([lambda: torch.mul(source, 1.0, out=target)], 2 * _COPY_BYTES),
        "read": timer.prepare([source.sum], _COPY_BYTES),
    }
    times = timer.measure(runners)
    return Bandwidth(
        copy=2 * _COPY_BYTES / times["copy"].us * 1e6, read=_COPY_BYTES / times["read"].us * 1e6
    )
