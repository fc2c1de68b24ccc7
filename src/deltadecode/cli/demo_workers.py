"""Both sides of the demo at once, then the larger model; and what is shown meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from threading import Thread
from typing import Any, NoReturn

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deltadecode.cli.output import progress_bar

NAMES = {False: "full attention", True: "DELTA"}
_REFRESH = 0.25
_BETWEEN_NOTES = 15.0
_LINES = 2


class Worker:
    """A process that solves the problem one way, and what it has reported so far.

    Parameters
    ----------
    task : dict
        See :mod:`deltadecode.cli.demo_worker`.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        self.name = NAMES[task["delta"]]
        self.reported: dict[str, Any] = {"tokens": 0, "tail": "", "pairs": 0}
        self.started: float | None = None
        # A session of its own: an interrupt from the keyboard reaches this process alone, which
        # then ends its workers.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deltadecode.cli.demo_worker", json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def waits_for(self, key: str) -> bool:
        """Whether it has yet to report something, and still may."""
        return self._reader.is_alive() and key not in self.reported

    @property
    def speed(self) -> float:
        """Tokens per second so far."""
        taken = 0.0 if self.started is None else time.monotonic() - self.started
        return self.reported["tokens"] / taken if taken else 0.0

    def proceed(self) -> None:
        """Let it do what it waits with: decode, and then time steps."""
        assert self._process.stdin is not None
        self.started = self.started or time.monotonic()
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def result(self, key: str) -> Any:
        """What it reported as ``"ready"``, ``"done"`` or ``"step"``; raises if it ended without."""
        if key not in self.reported:
            self._fail(self.reported.get("error") or f"exit code {self._process.wait()}")
        return self.reported[key]

    def check(self) -> None:
        """Raise what it reported of a failure, of whatever it was at."""
        if "error" in self.reported:
            self._fail(self.reported["error"])

    def _fail(self, reason: str) -> NoReturn:
        work = "timing a step" if "done" in self.reported else f"decoding with {self.name}"
        raise RuntimeError(f"{work} failed: {reason}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.reported |= json.loads(line)


def run(
    task: dict[str, Any], larger: dict[str, Any] | None, console: Console
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Solve one problem with full attention and with DELTA, both at once; then time a step.

    Parameters
    ----------
    task : dict
        Of :mod:`deltadecode.cli.demo_worker`: ``kind``, ``model`` (folder), and ``seed`` and
        ``steps`` of a problem.
    larger : dict or None
        ``context`` and ``shape`` of the model to time, and how many ``pairs`` of steps.
    console : rich.console.Console
        Where progress is shown.

    Returns
    -------
    tuple
        Of full attention, of DELTA, and of the step; None where no larger model is asked for.
    """
    with ExitStack() as stack:
        full, delta = workers = [
            stack.enter_context(
                Worker({**task, "delta": is_delta, "larger": larger if is_delta else None})
            )
            for is_delta in (False, True)
        ]
        reads = " and reading the text" if task.get("kind") == "text" else ""
        with console.status(f"loading the model{reads}"):
            while _going(workers, "ready"):
                time.sleep(_REFRESH)
        _results(workers, "ready")
        for worker in workers:
            worker.proceed()
        _watch(workers, console)
        _results(workers, "done")
        if larger is None:
            return full.result("done"), delta.result("done"), None
        delta.proceed()
        with progress_bar("a larger model", larger["pairs"]) as (bar, bar_task):
            while delta.waits_for("step"):
                bar.update(bar_task, completed=delta.reported["pairs"])
                time.sleep(_REFRESH)
        return full.result("done"), delta.result("done"), delta.result("step")


def _results(workers: list[Worker], key: str) -> None:
    """Raise unless every worker has reported it."""
    # The one that has failed speaks first: the other one was not waited for.
    for worker in workers:
        worker.check()
    for worker in workers:
        worker.result(key)


def _going(workers: list[Worker], key: str) -> bool:
    # When one has failed, the other one is not waited for.
    failed = any("error" in worker.reported for worker in workers)
    return not failed and any(worker.waits_for(key) for worker in workers)


def _watch(workers: list[Worker], console: Console) -> None:
    if not console.is_terminal:
        _watch_plainly(workers, console)
        return
    with Live(
        console=console, transient=True, auto_refresh=False, redirect_stdout=False,
        redirect_stderr=False,
    ) as live:  # fmt: skip
        while _going(workers, "done"):
            live.update(Group(*(_view(worker) for worker in workers)), refresh=True)
            time.sleep(_REFRESH)


def _watch_plainly(workers: list[Worker], console: Console) -> None:
    due = time.monotonic() + _BETWEEN_NOTES
    while _going(workers, "done"):
        time.sleep(_REFRESH)
        if time.monotonic() >= due:
            due += _BETWEEN_NOTES
            console.print("; ".join(_count(worker) for worker in workers), soft_wrap=True)


def _count(worker: Worker) -> str:
    tokens, total = worker.reported["tokens"], worker.reported["ready"]
    return f"{worker.name}: {tokens:,} of {total:,} tokens, {worker.speed:.0f} tok/s"


def _view(worker: Worker) -> Group:
    reported = worker.reported
    speed = f"{reported['tokens']:,} tokens  {worker.speed:.0f} tok/s"
    head = Table.grid(padding=(0, 1))
    head.add_row(
        f"{worker.name:>14}",
        ProgressBar(total=reported["ready"], completed=reported["tokens"], width=20),
        speed if worker.waits_for("done") else "done",
    )
    lines = reported["tail"].splitlines()[-_LINES:]
    text = "\n".join(["", *lines] if len(lines) < _LINES else lines)
    return Group(head, Text(text, style="dim", no_wrap=True, overflow="ellipsis"))
