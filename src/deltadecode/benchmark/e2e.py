"""The end-to-end benchmark: vLLM with stock attention and with DELTA, same engine, same work.

``python -m deltadecode.benchmark.e2e`` or ``deltadecode bench e2e``. The sides take turns, a
process each, since an engine keeps the memory of its GPU. Results are written as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

import deltadecode
from deltadecode.benchmark.e2e_rows import SIDES, Found, rows, say
from deltadecode.benchmark.e2e_shapes import SHAPES, plugin_path, write_shape
from deltadecode.benchmark.results import check_tag, result, table, write_result

_PROMPT = 4
# Tokens that vLLM prefills at a time, at least: bounds the steps that a prefill takes.
_PREFILL_CHUNK = 2048
_WORKER = "deltadecode.benchmark.e2e_worker"


@dataclass(frozen=True)
class Work:
    """What is measured; both sides do all of it, in one engine each.

    Attributes
    ----------
    shape : str
        One of ``SHAPES``, with random weights, or the folder of a model.
    batch : int
        Sequences.
    contexts : tuple of int
        Tokens of the prompts before a step is timed.
    decode_to : int or None
        Also decode prompts of four tokens to this length.
    steps : int
        Decode steps that a median is taken of.
    profile : bool
        Also list the kernels of decode steps at the longest context.
    config : dict
        The ``deltadecode`` object of ``--additional-config``.
    engine : dict
        More arguments of ``vllm.LLM``, for both sides.
    """

    shape: str = "r1-1.5b"
    batch: int = 64
    contexts: tuple[int, ...] = (768, 2048, 8192, 18000)
    decode_to: int | None = None
    steps: int = 128
    profile: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)

    def longest(self) -> int:
        """Tokens of the longest sequence, whatever of it is prefilled while others decode.

        Returns
        -------
        int
        """
        prompts = max(self.contexts, default=_PROMPT)
        return max(prompts + self.room(), self.decode_to or 0)

    def room(self) -> int:
        """Tokens that a sequence may write after its prompt.

        Returns
        -------
        int
        """
        prefill_steps = -(-self.batch * max(self.contexts, default=0) // _PREFILL_CHUNK)
        return self.steps + prefill_steps + 64


def make_task(work: Work, side: str, model: Path, folder: Path) -> dict[str, Any]:
    """What a worker process is told.

    Parameters
    ----------
    work : Work
        What to measure.
    side : str
        ``"stock"`` or ``"delta"``.
    model : Path
        Folder of the model.
    folder : Path
        For traces.

    Returns
    -------
    dict
        ``engine`` (arguments of ``vllm.LLM``), ``parts``, ``room`` and ``traces``.
    """
    engine: dict[str, Any] = {
        "model": str(model),
        "max_num_seqs": work.batch,
        "max_model_len": work.longest(),
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "seed": 0,
        **work.engine,
    }
    if work.shape in SHAPES:
        engine |= {"load_format": "dummy", "skip_tokenizer_init": True}
    if side == "delta":
        engine["attention_backend"] = "CUSTOM"
        engine["additional_config"] = {"deltadecode": work.config}
    traces = folder / f"traces-{side}"
    parts: list[dict[str, Any]] = [
        {"kind": "step", "batch": work.batch, "context": context, "steps": work.steps}
        for context in work.contexts
    ]
    if work.profile:
        engine["profiler_config"] = {
            "profiler": "torch",
            "torch_profiler_dir": str(traces.resolve()),
            "torch_profiler_with_stack": False,
        }
        longest = max(work.contexts, default=_PROMPT)
        parts.append({"kind": "profile", "batch": work.batch, "context": longest})
    if work.decode_to is not None:
        parts.append(
            {"kind": "decode", "batch": work.batch, "prompt": _PROMPT, "tokens": work.decode_to}
        )
    return {"engine": engine, "parts": parts, "room": work.room(), "traces": str(traces)}


def run(
    work: Work,
    command: str,
    *,
    sides: tuple[str, ...] = SIDES,
    progress: Callable[[str, float], None] = lambda case, done: None,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Run the benchmark.

    Parameters
    ----------
    work : Work
        What to measure.
    command : str
        That repeats it, for the result.
    sides : tuple of str
        Which sides to run; a row needs both.
    progress : callable
        Told what was measured and the part of all work that is done.
    keep : callable
        Given the result so far after each measurement.

    Returns
    -------
    dict
        See :func:`deltadecode.benchmark.results.result`; ``sides`` has what each side found.

    Raises
    ------
    RuntimeError
        When a side fails, with the end of what it said.
    ValueError
        When there is no such shape and no such folder.
    """
    found: Found = {side: [] for side in sides}
    with tempfile.TemporaryDirectory(prefix="deltadecode-e2e-") as name:
        folder = Path(name)
        given = Path(work.shape)
        model = given if given.is_dir() else write_shape(work.shape, folder)
        tasks = {side: make_task(work, side, model, folder) for side in sides}
        total = sum(1 + len(task["parts"]) for task in tasks.values())
        for side, task in tasks.items():

            def take(item: dict[str, Any], side: str = side) -> None:
                found[side].append(item)
                progress(f"{side}: {say(item)}", sum(map(len, found.values())) / total)
                keep(_result(command, work, found))

            _run_side(side, task, folder, take)
    return _result(command, work, found)


def _run_side(
    side: str, task: dict[str, Any], folder: Path, take: Callable[[dict[str, Any]], None]
) -> None:
    report, log = folder / f"{side}.jsonl", folder / f"{side}.log"
    report.touch()
    source = Path(deltadecode.__file__).resolve().parents[1]
    paths = (plugin_path(folder), source, os.environ.get("PYTHONPATH"))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("wb") as output, report.open(encoding="utf-8") as lines:
        process = subprocess.Popen(
            [sys.executable, "-m", _WORKER, json.dumps(task), str(report)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while process.poll() is None:
                _read(lines, take)
                time.sleep(0.5)
            _read(lines, take)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        end = log.read_text(encoding="utf-8", errors="replace").strip()[-3000:]
        raise RuntimeError(f"the {side} side failed with exit code {process.returncode}:\n{end}")


def _read(lines: Any, take: Callable[[dict[str, Any]], None]) -> None:
    while line := lines.readline():
        take(json.loads(line))


def _result(command: str, work: Work, found: Found) -> dict[str, Any]:
    name = Path(work.shape).name if Path(work.shape).is_dir() else work.shape
    return {
        **result("e2e", command, rows(name, found)),
        "work": {
            "model": name,
            "batch": work.batch,
            "max_model_len": work.longest(),
            "steps": work.steps,
            "config": work.config,
        },
        "sides": found,
    }


def write_e2e(
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
    path = write_result(found, folder, tag)
    say(f"wrote {path}")
    try:
        from deltadecode.benchmark.e2e_figure import draw

        draw(found, path.with_suffix(".png"))
    except ImportError:
        say("no figure drawn; pip install 'deltadecode[bench]' brings matplotlib")
    except ValueError as error:
        say(f"no figure drawn: {error}")
    else:
        say(f"wrote {path.with_suffix('.png')}")


def main() -> None:
    """Run from the command line; the same options as ``deltadecode bench e2e``."""
    parser = argparse.ArgumentParser(description="vLLM with stock attention and with DELTA.")
    parser.add_argument("--shape", default="r1-1.5b", help=f"{', '.join(SHAPES)}, or a folder")
    parser.add_argument("--batch", type=int, default=64, help="sequences")
    parser.add_argument("--context", type=int, action="append", default=[], help="repeatable")
    parser.add_argument("--decode-to", type=int, help="also decode short prompts to this length")
    parser.add_argument("--steps", type=int, default=128, help="steps of a median")
    parser.add_argument("--profile", action="store_true", help="also list kernels")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON; see docs/vllm.md")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON; of vllm.LLM")
    parser.add_argument("--side", choices=SIDES, action="append", default=[], help="repeatable")
    parser.add_argument("--out", type=Path, help="folder to write the result and figure to")
    parser.add_argument("--tag", help="last part of the files' names")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    given = parser.parse_args()

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def keep(found: dict[str, Any]) -> None:
        if given.out:
            write_result(found, given.out, given.tag)

    try:
        check_tag(given.tag)
        work = Work(
            given.shape, given.batch, tuple(given.context) or Work.contexts, given.decode_to,
            given.steps, given.profile, given.config, given.engine,
        )  # fmt: skip
        found = run(
            work,
            command_line(work),
            sides=tuple(given.side) or SIDES,
            progress=lambda case, done: tell(f"{done:4.0%} {case}"),
            keep=keep,
        )
    except (RuntimeError, ValueError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    if given.out:
        write_e2e(found, given.out, given.tag, tell)
    if given.json:
        print(json.dumps(found))
    else:
        Console().print(table(found))


def command_line(work: Work) -> str:
    """Command that repeats a run, for its result file.

    Parameters
    ----------
    work : Work
        What was measured.

    Returns
    -------
    str
    """
    shape = Path(work.shape).name if Path(work.shape).is_dir() else work.shape
    parts = [f"deltadecode bench e2e --shape {shape} --batch {work.batch}"]
    parts += [f"--context {context}" for context in work.contexts]
    if work.decode_to is not None:
        parts.append(f"--decode-to {work.decode_to}")
    parts.append(f"--steps {work.steps}")
    parts += ["--profile"] if work.profile else []
    for option, value in (("config", work.config), ("engine", work.engine)):
        parts += [f"--{option} '{json.dumps(value)}'"] if value else []
    return " ".join(parts)


if __name__ == "__main__":
    main()
