"""Both sides of the demo at once, and what is shown meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from threading import Thread
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

NAMES = {False: "full attention", True: "DELTA"}
_REFRESH = 0.2
_BETWEEN_NOTES = 15.0
_LINES = 2


class Worker:
    """A process that solves the problem one way, and what it has told so far.

    Parameters
    ----------
    task : dict
        See :mod:`deltadecode.cli.demo_worker`.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        self.name = NAMES[task["delta"]]
        self.told: dict[str, Any] = {"tokens": 0, "tail": ""}
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    @property
    def running(self) -> bool:
        """Whether it may still tell something."""
        return self._reader.is_alive()

    @property
    def speed(self) -> float:
        """Tokens per second so far."""
        taken = 0.0 if self.started is None else time.monotonic() - self.started
        return self.told["tokens"] / taken if taken else 0.0

    def start(self) -> None:
        """Let it decode."""
        assert self._process.stdin is not None
        self.started = time.monotonic()
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """What it found, once it has ended.

        Returns
        -------
        dict

        Raises
        ------
        RuntimeError
            When it failed.
        """
        if "done" not in self.told:
            reason = self.told.get("error", f"exit code {self._process.wait()}")
            raise RuntimeError(f"decoding with {self.name} failed: {reason}")
        found: dict[str, Any] = self.told["done"]
        return found

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.told |= json.loads(line)


def solve(
    model: str, seed: int, steps: int | None, console: Console
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Solve one problem with full attention and with DELTA, both at once.

    Parameters
    ----------
    model : str
        Folder of the embedded model.
    seed : int
        Of the problem.
    steps : int or None
        Length of the problem; None: the usual one.
    console : rich.console.Console
        Where progress is shown.

    Returns
    -------
    tuple of dict
        Of full attention and of DELTA.

    Raises
    ------
    RuntimeError
        When one of them fails.
    """
    with ExitStack() as stack:
        task = {"model": model, "seed": seed, "steps": steps}
        full, delta = workers = [
            stack.enter_context(Worker({**task, "delta": side})) for side in (False, True)
        ]
        with console.status("loading the model"):
            while not all("ready" in worker.told for worker in workers):
                # One that ends before it is ready has failed.
                for worker in workers:
                    if not worker.running:
                        worker.result()
                time.sleep(_REFRESH)
        for worker in workers:
            worker.start()
        _watch(workers, console)
        return full.result(), delta.result()


def _watch(workers: list[Worker], console: Console) -> None:
    if not console.is_terminal:
        _watch_plainly(workers, console)
        return
    with Live(
        console=console,
        transient=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as live:
        while any(worker.running for worker in workers):
            live.update(Group(*(_view(worker) for worker in workers)), refresh=True)
            time.sleep(_REFRESH)


def _watch_plainly(workers: list[Worker], console: Console) -> None:
    due = time.monotonic() + _BETWEEN_NOTES
    while any(worker.running for worker in workers):
        time.sleep(_REFRESH)
        if time.monotonic() >= due:
            due += _BETWEEN_NOTES
            console.print("; ".join(_count(worker) for worker in workers), soft_wrap=True)


def _count(worker: Worker) -> str:
    told = worker.told
    return (
        f"{worker.name}: {told['tokens']:,} of {told['ready']:,} tokens, {worker.speed:.0f} tok/s"
    )


def _view(worker: Worker) -> Group:
    told = worker.told
    head = Table.grid(padding=(0, 1))
    head.add_row(
        f"{worker.name:>14}",
        ProgressBar(total=told["ready"], completed=told["tokens"], width=20),
        f"{told['tokens']:,} tokens  {worker.speed:.0f} tok/s" if worker.running else "done",
    )
    lines = told["tail"].splitlines()[-_LINES:]
    text = "\n".join(["", *lines] if len(lines) < _LINES else lines)
    return Group(head, Text(text, style="dim", no_wrap=True, overflow="ellipsis"))
