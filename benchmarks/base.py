"""Another commit's code beside this one's, each in a process of its own, timed in turns."""

import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

from benchmarks.processes import ROOT, Process
from benchmarks.report import Progress
from deltadecode.cli.output import BadInput
from deltadecode.lab.results import row

WORKER = (sys.executable, "-m", "benchmarks.base_worker")
ROUNDS = 9


def compare(
    commit: str | None,
    folder: Path | None,
    spec: dict[str, Any],
    cases: Sequence[dict[str, Any]],
    rounds: int,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Time every case with both commits, one round of each after the other.

    The base is a commit of this checkout, or a folder with its source, which the commit then only
    names. ``spec`` starts :mod:`benchmarks.base_worker`. Yields rows whose ``theirs`` is the base:
    medians over the rounds, with the quartiles of both sides.
    """
    with ExitStack() as stack:
        name, base = stack.enter_context(_source(commit, folder))
        sides = [
            Process(side, {**spec, "source": str(source)}, WORKER, role="side", source=source)
            for side, source in (("this commit", ROOT / "src"), (name, base))
        ]
        for side in sides:
            stack.callback(side.kill)
        for side in sides:
            side.ready()
        for number, case in enumerate(cases):
            progress(case["label"], number / len(cases))
            # What was timed -> one list per side, with a value a round.
            times: dict[str, list[list[float]]] = defaultdict(lambda: [[], []])
            for side in sides:
                side.do({"do": "prepare", **case})
            for turn in range(rounds):
                for at in (0, 1) if turn % 2 == 0 else (1, 0):
                    for what, value in sides[at].do({"do": "time"}).items():
                        times[what][at].append(value)
            for what, values in times.items():
                # Not every commit's operations can be captured into a graph.
                if all(values):
                    ours, theirs = (quantiles(side, n=4, method="inclusive") for side in values)
                    quartiles = {"quartiles_ours": ours, "quartiles_theirs": theirs}
                    label = f"{what}, {case['label']}"
                    yield row(label, name, spec["unit"], ours[1], theirs[1], **quartiles)


@contextmanager
def _source(commit: str | None, folder: Path | None) -> Iterator[tuple[str, Path]]:
    """Name of the base, and its ``src``: given, or of a worktree for as long as it is used."""
    if folder is not None:
        if not (folder / "src" / "deltadecode").is_dir():
            raise BadInput(f"--base-source must have src/deltadecode, got {str(folder)!r}")
        yield f"base {commit or folder.resolve().name}", (folder / "src").resolve()
        return
    short = _git("rev-parse", "--short", "--verify", f"{commit}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="deltadecode-base-") as temporary:
        tree = Path(temporary) / "tree"
        _git("worktree", "add", "--detach", str(tree), short)
        try:
            yield f"base {short}", tree / "src"
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadInput(f"--base must be a commit of this checkout: {done.stderr.strip()}")
    return done.stdout.strip()
