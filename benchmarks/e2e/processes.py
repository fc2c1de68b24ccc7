"""Processes with an engine each, which work one at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

WORKER = (sys.executable, "-m", "benchmarks.e2e.worker")
_PATIENCE_S = 30


class EngineError(RuntimeError):
    """An engine's process failed; its message is one line that names the side."""


class Process:
    """An engine in a process of its own.

    Parameters
    ----------
    side : str
        For messages.
    spec : dict
        See :class:`benchmarks.e2e.engine.Engine`.
    command : sequence of str
        The process to start.
    """

    def __init__(self, side: str, spec: dict[str, Any], command: Sequence[str] = WORKER) -> None:
        self.side = side
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
        )
        self._send(spec)

    def ready(self) -> dict[str, Any]:
        """Wait until it can measure.

        Returns
        -------
        dict
            See :meth:`benchmarks.e2e.engine.Engine.facts`.

        Raises
        ------
        EngineError
            When it does not start.
        """
        return self._receive("ready")

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Have one command carried out.

        Parameters
        ----------
        command : dict
            See :meth:`benchmarks.e2e.engine.Engine.do`.

        Returns
        -------
        dict
            What was measured.

        Raises
        ------
        EngineError
            When it fails.
        """
        self._send(command)
        return self._receive("done")

    def stop(self) -> None:
        """End it, whatever it does."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):  # it is gone, with a command unread
            self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self.stop()

    def _send(self, value: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it died; reading its answer says so, and why
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()

    def _receive(self, kind: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise EngineError(
                f"{self.side} engine ended with exit code {code}: {self._last_line()}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.side} engine: {answer['error']}")
        value: dict[str, Any] = answer[kind]
        return value

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = [" ".join(line.split()) for line in self._log]
        return next((line for line in reversed(lines) if line), "it said nothing")
