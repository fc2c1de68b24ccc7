"""Time on a CUDA GPU: calls in CUDA graphs, several sides in turns, and the memory's bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol, TypeVar

import torch

from benchmarks.kernels.cases import calls_per_graph

_WARMUP = 5
_REPLAYS = 25
_COPY_BYTES = 2 * 2**30
Key = TypeVar("Key", bound=Hashable)
Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Time of one call.

    Attributes
    ----------
    us : float
        Median, in microseconds.
    graph : bool
        Whether it was captured into a CUDA graph; if not, launching it may be part of its time.
    """

    us: float
    graph: bool


@dataclass(frozen=True)
class Runner:
    """Something to time.

    Attributes
    ----------
    run : callable
        Runs all calls once.
    calls : int
        How many these are.
    graph : bool
        Whether they are one CUDA graph.
    """

    run: Call
    calls: int
    graph: bool


@dataclass(frozen=True)
class Bandwidth:
    """Of the device's memory, in bytes per second.

    Attributes
    ----------
    copy : float
        Read and written by a copy within the device.
    read : float
        Read by a sum.
    """

    copy: float
    read: float


class Timer(Protocol):
    """Prepares and times calls."""

    def prepare(self, calls: Sequence[Call], call_bytes: int) -> Runner:
        """Run calls, one per input set, for the first time, and make them ready to be timed."""

    def measure(self, runners: Mapping[Key, Runner]) -> dict[Key, Timing]:
        """Time them in turns."""


class GraphTimer:
    """Times CUDA graphs by events on the device."""

    def prepare(self, calls: Sequence[Call], call_bytes: int) -> Runner:
        """Warm up, then capture.

        Parameters
        ----------
        calls : sequence of callable
            The same operation, one per input set.
        call_bytes : int
            Bytes that one moves, to guess how many of them are worth timing.

        Returns
        -------
        Runner
            A graph; or plain calls, where capture fails.

        Raises
        ------
        Exception
            What a call raises outside of capture.
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

        Parameters
        ----------
        runners : mapping
            What :meth:`prepare` gave, by any key.

        Returns
        -------
        dict
            Key -> median over 25 replays, after 5 others.
        """
        spans: dict[Key, list[tuple[torch.cuda.Event, torch.cuda.Event]]]
        spans = {key: [] for key in runners}
        for turn in range(_WARMUP + _REPLAYS):
            for key, runner in runners.items():
                span = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                span[0].record()
                runner.run()
                span[1].record()
                if turn >= _WARMUP:
                    spans[key].append(span)
        torch.cuda.synchronize()
        return {
            key: Timing(
                1000 * median(start.elapsed_time(end) for start, end in spans[key]) / runner.calls,
                runner.graph,
            )
            for key, runner in runners.items()
        }


def measure_bandwidth(device: torch.device) -> Bandwidth:
    """Measure the bandwidth of the device's memory.

    Parameters
    ----------
    device : torch.device
        A CUDA device with 4 GiB free.

    Returns
    -------
    Bandwidth
        By 2 GiB each, many times the caches.
    """
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
