"""Both servers, each with all workloads and rates, in a folder of single runs."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import multicast
from benchmarks.e2e.measure import DELTA, SIDES, STOCK
from benchmarks.e2e.run import SHARE_OF_TWO
from benchmarks.e2e.shapes import ModelShape
from benchmarks.e2e.workloads import BLOCK, own_drafts
from benchmarks.report import Progress
from benchmarks.serve.client import ClientError, OutOfTimeError, drive
from benchmarks.serve.model import write_tokenizer
from benchmarks.serve.server import NAME, Server
from benchmarks.serve.workloads import Rate, Workload
from deltadecode.cli.serve import vllm_command
from deltadecode.config import DeltaConfig
from deltadecode.engines.serving.settings import KEY
from deltadecode.engines.vllm import BACKEND
from deltadecode.lab.results import result

TOKENIZER = "tokenizer"  # folder in the model's
_SPARE = 16  # tokens of a sequence beyond the longest request
_WARM_UP = (16, 512, 16)  # requests, tokens in, tokens out


@dataclass(frozen=True)
class LoadOptions:
    """What runs and how."""

    shape: ModelShape
    plan: DeltaConfig  # of the DELTA side
    workloads: Sequence[Workload]
    rates: Sequence[Rate]
    raw: Path  # folder of the single runs
    flags: Sequence[str] = ()  # of both servers, besides those that it needs
    variables: Mapping[str, str] = field(default_factory=dict)  # of both servers' environment
    sides: Sequence[str] = SIDES
    minutes: float | None = None
    rounds: int = 1  # of every run
    start_together: bool = False  # both live, with caches of just the size that is needed
    drafts: int = 0  # of the DELTA side, in lossless mode
    acceptance: float | None = None  # of each draft, drawn; None: found out
    start_minutes: float = 10.0  # for a server's start
    command: str = "python -m benchmarks.serve"

    def server_command(self, side: str, model: Path) -> list[str]:
        """The line that starts a side's server, but for its address."""
        longest = max(one.longest for one in self.workloads) + _SPARE
        line = [
            *vllm_command(), "serve", str(model), "--tokenizer", str(model / TOKENIZER),
            "--served-model-name", NAME,
            "--load-format", "dummy", "--dtype", "bfloat16", "--seed", "0",
            "--max-model-len", str(min(longest, self.shape.positions)),
            "--max-num-seqs", str(max(one.concurrency for one in self.workloads)),
            "--disable-uvicorn-access-log", multicast.FLAG,
            # Else a kernel is named once: not again, when it is compiled for another shape.
            "--jit-monitor-verbose",
        ]  # fmt: skip
        if self.shape.eager:
            line.append("--enforce-eager")
        if self.start_together:
            line += ["--gpu-memory-utilization", str(SHARE_OF_TWO)]
            # Else a server takes what is free, less what it sees taken while it starts.
            line += ["--kv-cache-memory-bytes", str(self._kv_bytes())]
        if side == DELTA:
            settings = json.dumps({KEY: self.plan.to_dict()})
            line += ["--attention-backend", BACKEND, "--additional-config", settings]
            if self.drafts:
                own = own_drafts(self.drafts, self.acceptance)
                line += ["--speculative-config", json.dumps(own)]
        return [*line, *self.flags]

    def name(self, side: str, workload: Workload, rate: Rate, number: int) -> str:
        """A run, as messages name it."""
        again = f", round {number}" if self.rounds > 1 else ""
        return f"{side}, {workload.name} at rate {rate}{again}"

    @property
    def mode(self) -> str:
        """What the rows of lossless mode are named by; empty otherwise."""
        if not self.drafts:
            return ""
        drawn = "" if self.acceptance is None else f", synthetic acceptance {self.acceptance:g}"
        return f", lossless with {self.drafts} drafts{drawn}"

    def _kv_bytes(self) -> int:
        # vLLM keeps a block to itself.
        return self.shape.kv_bytes() * (BLOCK + max(one.kv_tokens for one in self.workloads))

    def cases(self) -> list[tuple[Workload, Rate]]:
        """What has a row each, in order."""
        return [
            (workload, rate)
            for workload in self.workloads
            for rate in self.rates
            if rate.workload in (None, workload.name)
        ]

    def runs(self) -> list[tuple[Workload, Rate, int]]:
        """All runs of a side, in order: every case once for each round."""
        return [(*case, number) for case in self.cases() for number in self.numbers]

    @property
    def numbers(self) -> range:
        """Of the rounds, from 1 on."""
        return range(1, self.rounds + 1)


class Load:
    """The runs of a folder: those that are there, and those that are missing."""

    def __init__(
        self,
        options: LoadOptions,
        note: Callable[[str], None] = lambda line: None,
        progress: Progress = lambda case, done: None,
    ) -> None:
        self.options, self._note, self._progress = options, note, progress
        self._end = None if options.minutes is None else time.monotonic() + 60 * options.minutes

    def run(self) -> bool:
        """Make the runs that are missing; whether all are there now.

        A run that fails ends neither the others nor, unless it is gone, its server. A server that
        does not start is a ServerError.
        """
        check_facts(self.options)
        with tempfile.TemporaryDirectory(prefix="deltadecode-") as folder:
            model = self.options.shape.write(Path(folder) / self.options.shape.name)
            write_tokenizer(self.options.shape, model / TOKENIZER)
            sides = self.options.sides
            for group in [sides] if self.options.start_together else [[side] for side in sides]:
                missing = [side for side in group if self._missing(side)]
                if missing and not self._is_over():
                    self._serve(missing, model)
        return not unfinished(self.options)

    def _serve(self, sides: Sequence[str], model: Path) -> None:
        options = self.options
        servers: list[Server] = []
        try:
            for side in sides:
                self._tell(f"starting {side}")
                line = options.server_command(side, model)
                servers.append(Server(side, line, options.raw, options.variables))
            start_s = {}
            for server in servers:
                seconds = server.wait(min(60 * options.start_minutes, self._left() or 1e9))
                start_s[server.side] = round(seconds, 1)
            for server in servers:
                server.warm_up(*self._warm_up())
            for run in options.runs():
                for server in servers:
                    if read_run(options.raw, server.side, *run) is None and not self._is_over():
                        self._measure(server, model, *run)
                        if not server.alive():
                            raise server.failure("went away under load")
            for server in servers:
                facts = {**server.facts(), "start_s": start_s[server.side]}
                write_json(options.raw / f"{server.side}-server.json", facts)
        finally:
            for server in servers:
                server.stop()

    def _warm_up(self) -> tuple[int, int, int]:
        requests, tokens, output = _WARM_UP
        longest = min(self.options.workloads, key=lambda one: one.longest).longest
        return requests, max(1, min(tokens, longest - output)), output

    def _measure(
        self, server: Server, model: Path, workload: Workload, rate: Rate, number: int
    ) -> None:
        per_second = requests_per_second(self.options.raw, workload, rate)
        what = self.options.name(server.side, workload, rate, number)
        if per_second is None:
            self._note(f"left out {what}: stock vLLM has not served it at inf")
            return
        self._tell(what)
        try:
            found = drive(
                server,
                model / TOKENIZER,
                workload,
                rate,
                number,
                per_second,
                self.options.raw,
                self._left(),
            )
        except OutOfTimeError as error:
            self._note(f"{what}: {error}")
            self._end = time.monotonic()
        except ClientError as error:
            self._note(f"{what}: {error}")
        else:
            found |= {
                "workload": asdict(workload), "rate": str(rate),
                # JSON has no infinity.
                "per_second": None if rate.saturates else per_second,
            }  # fmt: skip
            write_json(run_file(self.options.raw, server.side, workload, rate, number), found)

    def _missing(self, side: str) -> list[tuple[Workload, Rate, int]]:
        raw = self.options.raw
        return [one for one in self.options.runs() if read_run(raw, side, *one) is None]

    def _left(self) -> float | None:
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)

    def _is_over(self) -> bool:
        return self._left() == 0.0

    def _tell(self, what: str) -> None:
        runs = len(self.options.runs()) * len(self.options.sides)
        missing = sum(len(self._missing(side)) for side in self.options.sides)
        self._progress(what, (runs - missing) / runs)


def run_file(raw: Path, side: str, workload: Workload, rate: Rate, number: int = 1) -> Path:
    """File of one run, which comes for the time that ``number`` says."""
    again = f"-{number}" if number > 1 else ""
    return raw / f"{side}-{workload.name}-{rate}{again}.json"


def read_run(
    raw: Path, side: str, workload: Workload, rate: Rate, number: int = 1
) -> dict[str, Any] | None:
    """What one run measured; None where there is none, or one of other lengths."""
    path = run_file(raw, side, workload, rate, number)
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if found["workload"] == asdict(workload) else None


def requests_per_second(raw: Path, workload: Workload, rate: Rate) -> float | None:
    """The rate as a number; None while stock's first run at inf is missing."""
    if not rate.of_stock:
        return rate.value
    stock = read_run(raw, STOCK, workload, Rate(float("inf")))
    return None if stock is None else float(f"{rate.value * stock['requests_s']:.3g}")


def unfinished(options: LoadOptions) -> list[str]:
    """Runs that are missing, of both sides."""
    return [
        options.name(side, *run)
        for side in SIDES
        for run in options.runs()
        if read_run(options.raw, side, *run) is None
    ]


def check_facts(options: LoadOptions) -> None:
    """Note what the runs of a folder have in common; a ValueError if it has runs of another kind.

    A row never has one side of one commit or card and the other side of another one.
    """
    facts = _facts(options)
    path = options.raw / "facts.json"
    if not path.is_file():
        options.raw.mkdir(parents=True, exist_ok=True)
        # GPUs are named before a server measures the memory that others take.
        write_json(path, facts)
        return
    known = _compared(read_facts(options.raw))
    for name, value in _compared(facts).items():
        # Older folders do not name all that may be set, and was not.
        if (known.get(name) or None) != (value or None):
            raise ValueError(
                f"{str(options.raw)!r} has runs with {name} {known.get(name)!r}, got {value!r}; "
                "take another folder"
            )


def read_facts(raw: Path) -> dict[str, Any]:
    """What the runs of a folder have in common; a ValueError for a folder without runs."""
    path = raw / "facts.json"
    if not path.is_file():
        raise ValueError(f"{str(raw)!r} has no runs")
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


def _facts(options: LoadOptions) -> dict[str, Any]:
    known = result("serve", "", [])
    return {
        "model": options.shape.name, "plan": options.plan.to_dict(),
        "flags": list(options.flags), "environment": dict(options.variables),
        "start_together": options.start_together,
        "mode": options.mode,
        "commit": known["commit"], "machine": known["machine"], "versions": known["versions"],
    }  # fmt: skip


def _compared(facts: dict[str, Any]) -> dict[str, Any]:
    machine = facts["machine"]
    device = machine["gpus"] or machine["cpu"]
    return {**{k: v for k, v in facts.items() if k != "machine"}, "device": device}


def engines(raw: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each server said of itself."""
    for side in SIDES:
        path = raw / f"{side}-server.json"
        if path.is_file():
            yield side, json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a file in one piece."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
