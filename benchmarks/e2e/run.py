"""The end-to-end benchmark: stock vLLM and the same engine with DELTA, on the same workloads.

``python -m benchmarks.e2e.run`` or ``deltadecode bench e2e``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.e2e.measure import Measurement, Setup
from benchmarks.e2e.processes import EngineError
from benchmarks.e2e.rows import e2e_table
from benchmarks.e2e.shapes import SHAPES, find_shape
from benchmarks.e2e.workloads import KINDS, parse_point, workloads
from deltadecode.config import DeltaConfig
from deltadecode.errors import DeltaDecodeError
from deltadecode.lab.results import check_tag, write_result, write_with_figure

# Two engines leave room for graphs and for what a process takes outside of its share.
_SHARE_OF_TWO = 0.42
_SHARE_OF_ONE = 0.85


def make_setup(
    *,
    shape: str = "r1-1.5b",
    kinds: Sequence[str] = (),
    points: Sequence[str] = (),
    steps: int = 64,
    rounds: int = 3,
    plan: Path | None = None,
    memory_share: float | None = None,
    in_turn: bool = False,
    start_together: bool = False,
) -> Setup:
    """Check what was asked for.

    Parameters
    ----------
    shape : str
        Of :data:`benchmarks.e2e.shapes.SHAPES`.
    kinds, points : sequence of str
        What to measure, and ``batch:context`` in place of the defaults.
    steps, rounds : int
        Decode steps of a round, and rounds.
    plan : Path, optional
        File of a DeltaConfig; by default the shape's own plan.
    memory_share : float, optional
        Of the device for each engine; by default 0.42, or 0.85 in turn.
    in_turn : bool
        One engine after the other.
    start_together : bool
        Both engines start at once.

    Returns
    -------
    Setup

    Raises
    ------
    ValueError
        For a value that cannot be.
    DeltaConfigError
        For a plan that is none, or none of this model.
    """
    model = find_shape(shape)
    for name, value in (("steps", steps), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    share = memory_share or (_SHARE_OF_ONE if in_turn else _SHARE_OF_TWO)
    if not 0.0 < share * (1 if in_turn else 2) <= 1.0:
        most = "1" if in_turn else "0.5, or --in-turn given"
        raise ValueError(f"memory share must be above 0 and at most {most}, got {share}")
    if in_turn and start_together:
        raise ValueError("--in-turn starts one engine after the other; got --start-together too")
    chosen = workloads(kinds, [parse_point(p) for p in points], steps=steps, rounds=rounds)
    longest = max(chosen, key=lambda one: one.longest)
    if longest.longest > model.positions:
        raise ValueError(
            f"context must fit {model.name}'s {model.positions} positions with "
            f"{longest.longest - longest.context} tokens to spare, got {longest.context}"
        )
    cfg = model.plan if plan is None else DeltaConfig.load(plan)
    cfg.layer_plan(model.layers)
    parts = ["deltadecode", "bench", "e2e", "--shape", shape]
    for option, values in (("workload", kinds), ("point", points)):
        parts += [part for value in values for part in (f"--{option}", value)]
    parts += ["--steps", str(steps), "--rounds", str(rounds)]
    parts += [] if plan is None else ["--plan", plan.name]
    parts += [] if memory_share is None else ["--memory-share", f"{memory_share:g}"]
    parts += ["--in-turn"] * in_turn + ["--start-together"] * start_together
    return Setup(
        shape=model,
        plan=cfg,
        workloads=chosen,
        memory_share=share,
        in_turn=in_turn,
        start_together=start_together,
        command=shlex.join(parts),
    )


def has_vllm() -> bool:
    """Whether vLLM is installed.

    Returns
    -------
    bool
    """
    return importlib.util.find_spec("vllm") is not None


def run(
    setup: Setup,
    *,
    out: Path | None = None,
    tag: str | None = None,
    progress: Callable[[str, float], None] = lambda what, done: None,
) -> dict[str, Any]:
    """Run the benchmark.

    Parameters
    ----------
    setup : Setup
        See :func:`make_setup`.
    out : Path, optional
        Folder of the result file, which is written again after every measurement.
    tag : str, optional
        Last part of its name.
    progress : callable
        Told what runs, and the part of all work that is done.

    Returns
    -------
    dict
        See :meth:`benchmarks.e2e.measure.Measurement.run`.

    Raises
    ------
    EngineError
        When an engine fails.
    """

    def save(found: dict[str, Any]) -> None:
        if out is not None:
            write_result(found, out, tag)

    with tempfile.TemporaryDirectory(prefix="deltadecode-") as folder:
        return Measurement(setup, save, progress).run(Path(folder) / setup.shape.name)


def finish(found: dict[str, Any], out: Path, tag: str | None, say: Callable[[str], None]) -> None:
    """Write the result for the last time and, where matplotlib is there, the figure beside it.

    Parameters
    ----------
    found : dict
        See :func:`run`.
    out : Path
        Folder.
    tag : str, optional
        Last part of the names.
    say : callable
        Told in one line each what was written, or why it was not.
    """

    def draw_it(path: Path) -> None:
        from benchmarks.e2e.figure import draw

        draw(found, path)

    write_with_figure(found, out, tag, draw_it, say)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Stock vLLM and DELTA, end to end.")
    parser.add_argument("--shape", default="r1-1.5b", help=", ".join(SHAPES))
    parser.add_argument(
        "--workload", action="append", default=[], help=f"{', '.join(KINDS)}; repeatable"
    )
    parser.add_argument("--point", action="append", default=[], help="batch:context; repeatable")
    parser.add_argument("--steps", type=int, default=64, help="decode steps of a round")
    parser.add_argument("--rounds", type=int, default=3, help="each first stock, then DELTA")
    parser.add_argument("--plan", type=Path, help="DeltaConfig as JSON")
    parser.add_argument("--memory-share", type=float, help="of the device, for each engine")
    parser.add_argument("--in-turn", action="store_true", help="one engine after the other")
    parser.add_argument("--start-together", action="store_true", help="start both at once")
    parser.add_argument("--out", type=Path, help="folder to write the result and figure to")
    parser.add_argument("--tag", help="last part of the files' names")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    given = parser.parse_args()
    try:
        check_tag(given.tag)
        setup = make_setup(
            shape=given.shape,
            kinds=given.workload,
            points=given.point,
            steps=given.steps,
            rounds=given.rounds,
            plan=given.plan,
            memory_share=given.memory_share,
            in_turn=given.in_turn,
            start_together=given.start_together,
        )
        if not has_vllm():
            raise ValueError("vLLM is not installed: pip install 'deltadecode[vllm]'")
    except (ValueError, DeltaDecodeError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        sys.exit(2)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        found = run(
            setup,
            out=given.out,
            tag=given.tag,
            progress=lambda what, done: say(f"{done:4.0%} {what}"),
        )
    except EngineError as error:
        sys.exit(f"{parser.prog}: error: {error}")
    if given.out:
        finish(found, given.out, given.tag, say)
    if given.json:
        print(json.dumps(found))
    else:
        Console().print(e2e_table(found))


if __name__ == "__main__":
    main()
