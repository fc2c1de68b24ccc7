"""What a profiler saw of decode steps: graph launches, kernels, and the gaps between them."""

import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_GRAPH_LAUNCH = "GraphLaunch"
_SHOWN = 25
Span = tuple[float, float]


def summarize(trace: Path, steps: int) -> dict[str, Any]:
    """Read a Chrome trace of ``torch.profiler``, of ``steps`` decode steps.

    Per step: ``graph_launches``, ``kernel_launches`` (outside of graphs), ``kernels_in_graphs``,
    ``kernels_outside``, ``copies``; in µs ``busy_us`` (something runs on the GPU), ``graph_us``
    (from the first kernel of a graph to its last), ``gaps_in_graph_us`` (nothing runs in between).
    ``period_us``: from one graph to the next, the median; None with fewer than two graphs.
    ``kernels``: the 25 names with most time, each with ``count`` and ``us`` per step and whether it
    ran ``in_graph``.
    """
    recorded = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    events = [event for event in recorded if event.get("ph") == "X"]
    calls = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    launches = {_correlation(e) for e in calls if _GRAPH_LAUNCH in e["name"]}
    on_gpu = [e for e in events if e.get("cat") in _GPU]
    kernels = [e for e in on_gpu if e["cat"] == "kernel"]
    # What a graph runs carries the correlation of the call that launched the graph.
    graphs: dict[Any, list[Span]] = defaultdict(list)
    for event in on_gpu:
        if _correlation(event) in launches:
            graphs[_correlation(event)].append(_span(event))
    spans = sorted((min(s)[0], max(end for _, end in s)) for s in graphs.values())
    graph_us = sum(end - start for start, end in spans)
    in_graph_busy = sum(_covered(spans) for spans in graphs.values())
    starts = [start for start, _ in spans]
    periods = sorted(b - a for a, b in pairwise(starts))
    in_graphs = sum(_correlation(e) in launches for e in kernels)

    def per_step(value: float) -> float:
        return round(value / steps, 2)

    return {
        "steps": steps,
        "graph_launches": per_step(len(launches)),
        "kernel_launches": per_step(sum("LaunchKernel" in e["name"] for e in calls)),
        "kernels_in_graphs": per_step(in_graphs),
        "kernels_outside": per_step(len(kernels) - in_graphs),
        "copies": per_step(len(on_gpu) - len(kernels)),
        "busy_us": per_step(_covered([_span(e) for e in on_gpu])),
        "graph_us": per_step(graph_us),
        "gaps_in_graph_us": per_step(graph_us - in_graph_busy),
        "period_us": round(periods[len(periods) // 2], 2) if periods else None,
        "kernels": _by_name(kernels, launches, steps),
    }


def _by_name(
    kernels: Sequence[dict[str, Any]], launches: set[Any], steps: int
) -> list[dict[str, Any]]:
    totals: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for event in kernels:
        totals[event["name"], _correlation(event) in launches].append(event["dur"])
    ranked = sorted(totals.items(), key=lambda item: -sum(item[1]))
    return [
        {
            "name": name[:160],
            "count": round(len(times) / steps, 2),
            "us": round(sum(times) / steps, 2),
            "in_graph": in_graph,
        }
        for (name, in_graph), times in ranked[:_SHOWN]
    ]


def _correlation(event: dict[str, Any]) -> Any:
    return event.get("args", {}).get("correlation")


def _span(event: dict[str, Any]) -> Span:
    return event["ts"], event["ts"] + event["dur"]


def _covered(spans: Sequence[Span]) -> float:
    """Length of the union: kernels of several streams may overlap."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
