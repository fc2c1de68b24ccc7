"""What a trace of PyTorch's profiler says of decode steps: graphs, kernels and gaps."""

from __future__ import annotations

import gzip
import itertools
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LISTED = 40


def summarize(folder: Path) -> dict[str, Any]:
    """Read the newest trace that has device work.

    Parameters
    ----------
    folder : Path
        Where vLLM wrote its traces.

    Returns
    -------
    dict
        See :func:`steps_of`; ``error`` alone when there is none.
    """
    files = sorted(folder.rglob("*.json*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files:
        data = path.read_bytes()
        events = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        events = events.get("traceEvents", [])
        if any(event.get("cat") in _ON_DEVICE for event in events):
            return steps_of(events)
    return {"error": f"no device work in {len(files)} traces"}


def steps_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Divide the device's work into steps: each begins with the first launch of a CUDA graph.

    Parameters
    ----------
    events : list of dict
        ``traceEvents``; times in µs.

    Returns
    -------
    dict
        ``graph_launches`` (all), ``steps`` (launches of the graph with the most kernels), and of a
        step, in the median: ``graph_kernels``, ``graph_span_us`` (first kernel to the end of the
        last), ``graph_idle_us`` (of it without any kernel), ``step_us`` (from one to the next),
        ``other_kernels`` (outside of it). ``kernels``: name, calls and µs a step, longest first.
    """
    device = [event for event in events if event.get("cat") in _ON_DEVICE]
    launches = {
        event["args"]["correlation"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver")
        and event.get("name", "").startswith(("cudaGraphLaunch", "cuGraphLaunch"))
    }
    graphs: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in device:
        correlation = event.get("args", {}).get("correlation")
        if correlation in launches:
            graphs[correlation].append(event)
    most = max(map(len, graphs.values()), default=0)
    # One graph is the step's own if it has half of the kernels of the largest.
    whole = [found for found in graphs.values() if 2 * len(found) > most]
    steps = len(whole)
    if not steps:
        return {"graph_launches": len(launches), "steps": 0, "device_events": len(device)}
    spans = [_span(found) for found in whole]
    starts = sorted(start for start, _, _ in spans)
    inside = sum(map(len, whole))
    result: dict[str, Any] = {
        "graph_launches": len(launches),
        "steps": steps,
        "graph_kernels": statistics.median(map(len, whole)),
        "graph_span_us": round(statistics.median(end - start for start, end, _ in spans), 1),
        "graph_idle_us": round(
            statistics.median(end - start - busy for start, end, busy in spans), 1
        ),
        "other_kernels": round((len(device) - inside) / steps, 1),
    }
    if steps > 1:
        gaps = [after - before for before, after in itertools.pairwise(starts)]
        result["step_us"] = round(statistics.median(gaps), 1)
    result["kernels"] = _by_name(device, steps)
    return result


def _span(found: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Start and end of a graph's kernels, and the time that at least one of them runs."""
    intervals = sorted((event["ts"], event["ts"] + event["dur"]) for event in found)
    busy, reached = 0.0, intervals[0][0]
    for start, end in intervals:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return intervals[0][0], reached, busy


def _by_name(device: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = defaultdict(list)
    for event in device:
        times[event["name"]].append(event["dur"])
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:_LISTED]
    return [
        {
            "name": name[:120],
            "calls": round(len(found) / steps, 2),
            "us": round(sum(found) / steps, 2),
        }
        for name, found in longest
    ]
