"""The kernel benchmark: decode attention on a GPU, ours beside its peers, in turns in one run."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.base import ROUNDS, compare
from benchmarks.kernels.cases import Shape
from benchmarks.kernels.measure import Bench, measure
from benchmarks.kernels.peers import find_peers
from benchmarks.kernels.timing import GraphTimer, measure_bandwidth
from benchmarks.report import Progress
from deltadecode.lab.results import result

# Leaves room for graphs, partial results of the kernels and what the peers keep.
_MEMORY_FRACTION = 0.6


def run(
    shapes: Sequence[Shape],
    *,
    command: str,
    memory_gib: float | None = None,
    progress: Progress = lambda case, done: None,
) -> dict[str, Any]:
    """Run on the first CUDA GPU; see :func:`benchmarks.kernels.measure.measure`.

    Inputs may take ``memory_gib`` GiB, by default 60 % of the memory that is free.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("python -m benchmarks.kernels needs a CUDA GPU; none was found")
    progress("bandwidth and peers", 0.0)
    device = torch.device("cuda", torch.cuda.current_device())
    peers, missing = find_peers()
    with torch.inference_mode():
        bandwidth = measure_bandwidth(device)
    torch.cuda.empty_cache()
    limit = _MEMORY_FRACTION * torch.cuda.mem_get_info(device)[0]
    bench = Bench(
        GraphTimer(), bandwidth, device, backend="triton", peers=peers, missing=missing,
        l2_bytes=torch.cuda.get_device_properties(device).L2_cache_size,
        memory_limit=int(limit if memory_gib is None else memory_gib * 2**30),
    )  # fmt: skip
    return measure(bench, shapes, command, progress)


def compare_commits(
    shapes: Sequence[Shape],
    commit: str | None,
    folder: Path | None,
    command: str,
    *,
    rounds: int = ROUNDS,
    progress: Progress = lambda case, done: None,
) -> dict[str, Any]:
    """Time the operations of another commit beside ours; see :func:`benchmarks.base.compare`.

    ``one by one`` is what a launch takes where the GPU is faster; ``in a graph`` is the GPU's time.
    """
    cases = [{"label": shape.label, **asdict(shape)} for shape in shapes]
    spec = {"kind": "calls", "unit": "us", "threads": torch.get_num_threads()}
    return result("kernels", command, [*compare(commit, folder, spec, cases, rounds, progress)])
