"""The kernel benchmark: decode attention on a GPU, ours beside its peers, in turns in one run.

``python -m benchmarks.kernels.run`` or ``deltadecode bench kernels``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.kernels.cases import Shape, grid, parse_heads
from benchmarks.kernels.measure import Bench, Progress, measure
from benchmarks.kernels.peers import find_peers
from benchmarks.kernels.rows import kernel_table
from benchmarks.kernels.timing import GraphTimer, measure_bandwidth
from deltadecode.lab.results import check_tag, reason, write_with_figure

# Leaves room for graphs, partial results of the kernels and what the peers keep.
_MEMORY_FRACTION = 0.6


def run(
    shapes: Sequence[Shape],
    *,
    command: str = "deltadecode bench kernels",
    memory_gib: float | None = None,
    progress: Progress = lambda case, done: None,
) -> dict[str, Any]:
    """Run the benchmark on the first CUDA GPU.

    Parameters
    ----------
    shapes : sequence of Shape
        See :func:`benchmarks.kernels.cases.grid`.
    command : str
        That repeats it, for the result.
    memory_gib : float, optional
        Memory that inputs may take, in GiB; by default 60 % of what is free.
    progress : callable
        Told the case that runs and the part of all work that is done.

    Returns
    -------
    dict
        See :func:`benchmarks.kernels.measure.measure`.

    Raises
    ------
    RuntimeError
        When there is no CUDA GPU.
    ValueError
        When our operations have no ``"triton"`` backend.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("deltadecode bench kernels needs a CUDA GPU; none was found")
    progress("bandwidth and peers", 0.0)
    device = torch.device("cuda", torch.cuda.current_device())
    peers, missing = find_peers()
    with torch.inference_mode():
        bandwidth = measure_bandwidth(device)
    torch.cuda.empty_cache()
    limit = _MEMORY_FRACTION * torch.cuda.mem_get_info(device)[0]
    bench = Bench(
        timer=GraphTimer(),
        bandwidth=bandwidth,
        device=device,
        backend="triton",
        l2_bytes=torch.cuda.get_device_properties(device).L2_cache_size,
        memory_limit=int(limit if memory_gib is None else memory_gib * 2**30),
        peers=peers,
        missing=missing,
    )
    return measure(bench, shapes, command, progress)


def write_kernels(
    found: dict[str, Any], folder: Path, tag: str | None, say: Callable[[str], None]
) -> None:
    """Write the result file and, where matplotlib is there, the figure beside it.

    Parameters
    ----------
    found : dict
        See :func:`run`.
    folder : Path
        Where to.
    tag : str, optional
        Last part of the names.
    say : callable
        Told in one line each what was written, or why it was not.
    """

    def draw_it(path: Path) -> None:
        from benchmarks.kernels.figures import draw

        draw(found, path)

    write_with_figure(found, folder, tag, draw_it, say)


def command_line(
    quick: bool,
    heads: Sequence[str],
    batches: Sequence[int],
    contexts: Sequence[int],
    memory_gib: float | None,
) -> str:
    """Command that repeats a run, for its result file.

    Parameters
    ----------
    quick : bool
        ``--quick``.
    heads : sequence of str
        Every ``--heads``.
    batches, contexts : sequence of int
        Every ``--batch`` and ``--context``.
    memory_gib : float, optional
        ``--memory-gib``.

    Returns
    -------
    str
    """
    parts = ["deltadecode bench kernels", *(["--quick"] if quick else [])]
    for option, values in (("heads", heads), ("batch", batches), ("context", contexts)):
        parts += [f"--{option} {value}" for value in values]
    if memory_gib is not None:
        parts.append(f"--memory-gib {memory_gib:g}")
    return " ".join(parts)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Decode attention on a GPU, beside its peers.")
    parser.add_argument("--quick", action="store_true", help="five shapes, under two minutes")
    parser.add_argument("--heads", action="append", default=[], help="Hq/Hkv; repeatable")
    parser.add_argument("--batch", action="append", type=int, default=[], help="repeatable")
    parser.add_argument("--context", action="append", type=int, default=[], help="repeatable")
    parser.add_argument("--memory-gib", type=float, help="memory that inputs may take")
    parser.add_argument("--out", type=Path, help="folder to write the result and figure to")
    parser.add_argument("--tag", help="last part of the files' names")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    given = parser.parse_args()
    try:
        check_tag(given.tag)
        shapes = grid(
            quick=given.quick,
            heads=[parse_heads(text) for text in given.heads],
            batches=given.batch,
            contexts=given.context,
        )
    except ValueError as error:
        parser.error(str(error))

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    command = command_line(given.quick, given.heads, given.batch, given.context, given.memory_gib)
    try:
        found = run(
            shapes,
            command=command,
            memory_gib=given.memory_gib,
            progress=lambda case, done: say(f"{done:4.0%} {case}"),
        )
    except (RuntimeError, ValueError) as error:
        sys.exit(f"{parser.prog}: error: {reason(error)}")
    if given.out:
        write_kernels(found, given.out, given.tag, say)
    if given.json:
        print(json.dumps(found))
    else:
        Console().print(kernel_table(found))


if __name__ == "__main__":
    main()
