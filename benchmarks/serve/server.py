"""One ``vllm serve``, started, asked and stopped."""

import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.processes import environment, write_entry_point
from deltadecode.cli.output import one_line

NAME = "load"  # of the model, in requests
_STOP_S = 60
_QUIET = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# Behind the name come details in brackets, or the end of the sentence.
_JIT = re.compile(r"JIT compilation during inference: (\S+)")
_SECOND_RUNNER = b"Using V2 Model Runner"
_ERROR = re.compile(r"(error|refused|exception)\b", re.IGNORECASE)


class ServerError(RuntimeError):
    """A server did not start, or went away; its message is one line with the log's last words."""


class Server:
    """A server on a free port of this machine, in a session of its own."""

    def __init__(
        self,
        side: str,
        command: Sequence[str],
        folder: Path,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.side = side
        self._log = folder / f"{side}-server.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._began = time.monotonic()
        self._warm = 0  # bytes of the log when the warm-up was over
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self.port)],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**server_environment(folder), **variables}, start_new_session=True,
            )  # fmt: skip

    def wait(self, seconds: float) -> float:
        """Wait until it answers, and give the seconds that its start took."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise self.failure(f"ended with exit code {self._process.returncode}")
            with suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return time.monotonic() - self._began
            time.sleep(0.5)
        raise self.failure(f"did not answer within {seconds:.0f} s")

    def failure(self, what: str) -> ServerError:
        """An error that says what happened, and what the log says about it."""
        return ServerError(f"the {self.side} server {what}: {last_words(self.log())}")

    def alive(self) -> bool:
        """Whether its process still runs."""
        return self._process.poll() is None

    def warm_up(self, requests: int, tokens: int, output: int) -> None:
        """Send some requests at once, which no measurement counts."""

        def ask(number: int) -> None:
            prompt = [(number + at) % 400 + 10 for at in range(tokens)]
            body = {"model": NAME, "prompt": prompt, "max_tokens": output, "ignore_eos": True}
            request = urllib.request.Request(
                f"{self.url}/v1/completions", json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )  # fmt: skip
            urllib.request.urlopen(request, timeout=300).close()

        try:
            with ThreadPoolExecutor(requests) as threads:
                list(threads.map(ask, range(requests)))
        except OSError as error:
            raise self.failure(f"did not answer a request ({one_line(error)})") from error
        self._warm = self._log.stat().st_size

    def metrics(self) -> dict[str, float]:
        """Sums of its metrics over their labels."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode()
        return parse_metrics(text)

    def log(self) -> str:
        """What it has written so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def facts(self) -> dict[str, Any]:
        """What its log says: tokens of the KV cache, and kernels that requests waited for.

        ``jit_compilations`` are those after the warm-up, ``jit_kernels`` how many of them each
        kernel has, and ``jit_kernels_warm_up`` the same of before. ``model_runner`` is which of
        vLLM's two it has.
        """
        written = self._log.read_bytes()
        before, after = compiled(written[: self._warm]), compiled(written[self._warm :])
        found = re.search(rb"KV cache size: ([\d,]+) tokens", written)
        tokens = int(found[1].replace(b",", b"")) if found else None
        return {
            "kv_tokens": tokens, "model_runner": 2 if _SECOND_RUNNER in written else 1,
            "jit_compilations": sum(after.values()),
            "jit_kernels": after, "jit_kernels_warm_up": before,
        }  # fmt: skip

    def stop(self) -> None:
        """End it and all of its processes."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
        with suppress(ProcessLookupError):  # none of its session is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def server_environment(folder: Path) -> dict[str, str]:
    """Environment in which each process of vLLM finds the plugin, installed or not."""
    kept = environment()
    # The interpreter of Triton is for tests of kernels; vLLM takes its presence for a GPU's.
    kept.pop("TRITON_INTERPRET", None)
    for name, value in _QUIET.items():
        kept.setdefault(name, value)
    kept["VLLM_LOGGING_LEVEL"] = "INFO"  # the size of the cache is said there
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if not any(plugin.name == "deltadecode" for plugin in plugins):
        kept["PYTHONPATH"] = os.pathsep.join([str(write_entry_point(folder)), kept["PYTHONPATH"]])
    return kept


def compiled(log: bytes) -> dict[str, int]:
    """Kernels that a log says were compiled, with how often each was."""
    names = _JIT.findall(log.decode("utf-8", errors="replace"))
    return dict(Counter(name.rstrip(".") for name in names))


def parse_metrics(text: str) -> dict[str, float]:
    """Read Prometheus' format: name -> sum over the labels."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            bare = name.partition("{")[0]
            found[bare] = found.get(bare, 0.0) + float(value)
    return found


def last_words(log: str) -> str:
    """The line of a log that says what went wrong, or its last one."""
    lines = [one for line in log.splitlines() if (one := " ".join(line.split()))]
    errors = [line for line in lines if _ERROR.search(line)]
    return (errors or lines or ["it said nothing"])[-1][-300:]
