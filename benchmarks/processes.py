"""Processes that measure, one at a time: started here, and answering with JSON lines."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TextIO

import deltadecode
from benchmarks import multicast

ROOT = Path(__file__).resolve().parents[1]
_PATIENCE_S = 30


def environment(source: Path = ROOT / "src") -> dict[str, str]:
    """Environment of a process that imports ``deltadecode`` from here, and ``benchmarks``.

    NVLink multicast is off in it.
    """
    paths = [str(source), str(ROOT), os.environ.get("PYTHONPATH", "")]
    found = {**os.environ, **multicast.ENVIRONMENT}
    return {**found, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def write_entry_point(folder: Path) -> Path:
    """Write what an installation would have, so that vLLM finds the plugin in a source tree.

    Gives the folder to have on the path.
    """
    place = (folder / "plugin").resolve()
    info = place / f"deltadecode-{deltadecode.__version__}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    about = f"Metadata-Version: 2.1\nName: deltadecode\nVersion: {deltadecode.__version__}\n"
    (info / "METADATA").write_text(about, encoding="utf-8")
    point = "[vllm.general_plugins]\ndeltadecode = deltadecode_vllm:register\n"
    (info / "entry_points.txt").write_text(point, encoding="utf-8")
    return place


def serve(lines: TextIO, answers: TextIO, start: Callable[[dict[str, Any]], Any]) -> int:
    """Start a worker as the first line says, and do what each further line says, to the end.

    Its ``facts()`` and ``do(command)`` give what JSON can hold. Answers are lines
    ``{"ready": ...}``, ``{"done": ...}`` or ``{"error": "one line"}``; the error is then raised.
    """

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        worker = start(json.loads(lines.readline()))
        answer(ready=worker.facts())
        for line in lines:
            answer(done=worker.do(json.loads(line)))
    except BaseException as error:
        text = " ".join(str(error).split())
        answer(error=f"{type(error).__name__}: {text}" if text else type(error).__name__)
        raise
    return 0


def serve_process(start: Callable[[dict[str, Any]], Any]) -> NoReturn:
    """Serve this process's input and exit."""
    # Engines print to stdout; what the other side reads goes out by a file of its own.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        sys.exit(serve(sys.stdin, answers, start))


class WorkerError(RuntimeError):
    """A process failed; its message is one line that names the side."""


class Process:
    """A worker in a process of its own, started with ``spec``.

    Messages name it by ``side`` and ``role``; ``source`` has the ``deltadecode`` that it imports,
    and ``variables`` are added to its environment.
    """

    def __init__(
        self,
        side: str,
        spec: dict[str, Any],
        command: Sequence[str],
        *,
        role: str = "engine",
        source: Path = ROOT / "src",
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.side = side
        self._name = f"{side} {role}"
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            text=True, encoding="utf-8", env={**environment(source), **variables},
        )  # fmt: skip
        self._send(spec)

    def ready(self) -> dict[str, Any]:
        """Wait until it can measure; a :class:`WorkerError` when it does not start."""
        return self._receive("ready")

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Have one command carried out; a :class:`WorkerError` when it fails."""
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
            raise WorkerError(f"{self._name} ended with exit code {code}: {self._last_line()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self._name}: {answer['error']}")
        value: dict[str, Any] = answer[kind]
        return value

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = [" ".join(line.split()) for line in self._log]
        return next((line for line in reversed(lines) if line), "it said nothing")
