"""The soak: stock answers first, then DELTA under random requests, and what must hold after it."""

import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.command import command_line
from benchmarks.processes import Process
from benchmarks.report import Progress
from benchmarks.soak.engine import BLOCK
from deltadecode.config import DeltaConfig
from deltadecode.lab.results import result

WORKER = (sys.executable, "-m", "benchmarks.soak.engine")
_SAMPLES = 20  # of the memory, at least
_BETWEEN = 500  # requests between two of them, at most
_ENOUGH = 1000  # requests, to say how much the memory grows
_FLAT = 0.02  # growth of the memory that is none, of what it was
_PLAN_PAGE = 8
_LEAST_PROMPT, _FACT_TOKENS = 38, 8  # of a problem with one fact, and of each further one
_KV_BYTES = 2**30  # some 170,000 tokens of the embedded model
# Nats: by less than that, a token may turn to the second one. In bfloat16, sums in another order
# move a logit of 20 by some tenths; what a wrong page writes loses by several nats.
_TOLERANCES = {"float32": 1e-4, "bfloat16": 1.0}


@dataclass(frozen=True)
class SoakOptions:
    """What runs and how."""

    model: Path
    layers: int
    requests: int
    minutes: float | None = None  # of requests; then it ends, whatever is left
    prompts: int = 64  # distinct ones
    tokens: int = 32  # at most, of an answer
    concurrency: int = 16
    blocks: int | None = None  # of the KV cache; few make the engine preempt
    dtype: str = "float32"
    tolerance: float = 1e-4
    eager: bool = True
    memory_share: float = 0.85
    seed: int = 0
    command: str = "python -m benchmarks.soak"
    worker: Sequence[str] = WORKER

    def plan(self, longest: int) -> DeltaConfig:
        """A plan whose pages hold every sequence, so that its tokens are full attention's."""
        pages = -(-longest // _PLAN_PAGE) + 1
        half = self.layers // 2
        return DeltaConfig(
            page_size=_PLAN_PAGE, budget_pages=pages, recent_pages=1, sink_pages=0,
            dense_layers=(0,), delta_layers=(1, half) if half > 1 else (1,),
        )  # fmt: skip

    def spec(self, longest: int, delta: bool) -> dict[str, Any]:
        """What a side's process is started with; see :class:`benchmarks.soak.engine.Engine`."""
        return {
            "model": str(self.model), "dtype": self.dtype, "concurrency": self.concurrency,
            "longest": longest, "eager": self.eager, "seed": self.seed,
            "memory_share": self.memory_share,
            # Stock answers each prompt once, and needs no pressure for that.
            "blocks": self.blocks if delta else None,
            # Else vLLM measures what is free, and stops when another process frees some meanwhile.
            "kv_bytes": None if self.blocks is None or self.eager else _KV_BYTES,
            "plan": self.plan(longest).to_dict() if delta else None,
        }  # fmt: skip


def make_options(
    *,
    dtype: str | None,
    tolerance: float | None,
    input_len: int,
    **given: Any,
) -> SoakOptions:
    """Options of the embedded model, on the device that is there; a ValueError for wrong ones."""
    import torch

    from deltadecode.lab.tasks import model_path

    for name in ("minutes", "memory_share"):
        if given[name] is not None and not given[name] > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {given[name]:g}")
    on_gpu = torch.cuda.is_available()
    chosen = dtype or ("bfloat16" if on_gpu else "float32")
    if chosen not in _TOLERANCES:
        raise ValueError(f"--dtype must be {' or '.join(_TOLERANCES)}, got {chosen!r}")
    longest = input_len + given["tokens"]
    if given["blocks"] is not None and given["blocks"] * BLOCK < longest + BLOCK:
        raise ValueError(
            f"--blocks must hold {longest} tokens of one request, got {given['blocks']}"
        )
    options = {
        **{name: value for name, value in given.items() if name != "tokens"},
        "output_len": given["tokens"],
    }
    command = command_line("soak", input_len=input_len, dtype=dtype, tolerance=tolerance, **options)
    path = model_path()
    layers = json.loads((path / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    return SoakOptions(
        model=path, layers=layers, dtype=chosen, command=command, eager=not on_gpu,
        tolerance=_TOLERANCES[chosen] if tolerance is None else tolerance, **given,
    )  # fmt: skip


@dataclass
class Tally:
    """What the requests have come to."""

    started: int = 0
    aborted: int = 0
    finished: int = 0
    tokens: int = 0
    ties: int = 0  # requests whose first other token was a near tie
    most_lost: float = 0.0  # nats by which a token of stock vLLM had won, of those that turned
    wrong: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, float]] = field(default_factory=list)

    def add(self, found: dict[str, Any], answers: Sequence[dict[str, Any]], tol: float) -> None:
        """Count what a command of the engine gave."""
        self.started += found.get("started", 0)
        self.aborted += found["aborted"]
        names = ("rss_mib", "gpu_mib")
        self.memory.append({name: found[name] for name in names if name in found})
        for one in found["ended"]:
            self.finished += 1
            self.tokens += len(one["tokens"])
            place = first_difference(one, answers[one["prompt"]])
            if place is None:
                continue
            margins = answers[one["prompt"]]["margins"]
            lost = margins[place] if place < len(margins) else None  # cut short, or too long
            self.most_lost = max(self.most_lost, lost or 0.0)
            if lost is not None and lost <= tol:
                self.ties += 1
            else:
                self.wrong.append({"prompt": one["prompt"], "at": place, "lost": lost})


def soak(
    options: SoakOptions,
    prompts: Sequence[Sequence[int]],
    progress: Progress = lambda case, done: None,
) -> dict[str, Any]:
    """Run it. The result has ``failures``: one line for each thing that did not hold."""
    longest = max(map(len, prompts)) + options.tokens
    known = result("soak", options.command, [])
    progress("answers of stock vLLM", 0.0)
    asked = {"prompts": [list(prompt) for prompt in prompts], "tokens": options.tokens}
    with _engine(options, longest, delta=False) as process:
        answers = process.do({"do": "reference", **asked})["answers"]
    tally = Tally()
    with _engine(options, longest, delta=True) as process:
        process.do({"do": "prompts", **asked})
        chunk = min(max(1, options.requests // _SAMPLES), _BETWEEN)
        began = time.monotonic()
        end = None if options.minutes is None else began + 60 * options.minutes
        while tally.started < options.requests and (end is None or time.monotonic() < end):
            progress("DELTA", tally.started / options.requests)
            several = min(chunk, options.requests - tally.started)
            tally.add(process.do({"do": "run", "requests": several}), answers, options.tolerance)
        last = process.do({"do": "drain"})
        seconds = time.monotonic() - began
    tally.add(last, answers, options.tolerance)
    row = {
        "case": f"{tally.started:,} requests, at most {options.concurrency} at once",
        "started": tally.started, "finished": tally.finished, "aborted": tally.aborted,
        "tokens": tally.tokens, "seconds": round(seconds, 1), "wrong": len(tally.wrong),
        "near_ties": tally.ties, "most_lost": round(tally.most_lost, 4),
        "preemptions": last["preemptions"],
        "free_blocks": last["free"], "free_blocks_at_start": last["free_at_start"],
        "growth": growth([one["rss_mib"] for one in tally.memory], tally.started),
        "memory": tally.memory,
    }  # fmt: skip
    return {
        **known, "rows": [row], "model": options.model.name, "dtype": options.dtype,
        "plan": options.plan(longest).to_dict(), "first_wrong": tally.wrong[:10],
        "failures": failures(row, last),
    }  # fmt: skip


def failures(row: dict[str, Any], last: dict[str, Any]) -> list[str]:
    """What did not hold, one line each."""
    found = []
    if row["free_blocks"] != row["free_blocks_at_start"]:
        found.append(
            f"{row['free_blocks_at_start'] - row['free_blocks']} blocks of the cache leaked"
        )
    if last["held"] or last["live"] or row["finished"] + row["aborted"] != row["started"]:
        found.append(f"{row['started'] - row['finished'] - row['aborted']} requests never ended")
    if row["wrong"]:
        found.append(f"{row['wrong']} of {row['finished']} answers have a wrong token")
    if row["growth"] is not None and row["growth"] > _FLAT:
        found.append(f"memory grew by {row['growth']:.1%}")
    return found


def growth(samples: Sequence[float], requests: int) -> float | None:
    """By what part the memory grew from the third quarter of the samples to the last one.

    None for fewer than 1,000 requests. What is kept for later is made in the first thousands, so
    the first half says nothing; a leak grows in the last quarter as in any other.
    """
    quarter = len(samples) // 4
    if requests < _ENOUGH or not quarter:
        return None
    early, late = median(samples[-2 * quarter : -quarter]), median(samples[-quarter:])
    return round(late / early - 1.0, 4)


def first_difference(one: dict[str, Any], answer: dict[str, Any]) -> int | None:
    """Place of the first token that is not the answer's; None if there is none.

    An answer that is cut short, or goes on, differs there.
    """
    wanted = answer["tokens"][: one["asked"]]
    pairs = zip(one["tokens"], wanted, strict=False)
    place = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
    if place is None and len(one["tokens"]) != len(wanted):
        return min(len(one["tokens"]), len(wanted))
    return place


def random_prompts(count: int, longest: int, seed: int) -> list[list[int]]:
    """Prompts of random lengths, up to so many tokens: problems, and parts of their solutions.

    The embedded model is sure of what follows. Where it is not, as behind a part of a problem,
    stock attention itself writes other tokens in bfloat16 as soon as it adds in another order.
    """
    from tokenizers import Tokenizer

    from deltadecode.lab.tasks import make_problem, model_path

    if longest < _LEAST_PROMPT:
        raise ValueError(f"--input-len must be at least {_LEAST_PROMPT}, got {longest}")
    draw = random.Random(seed)
    tokenizer = Tokenizer.from_file(str(model_path() / "tokenizer.json"))
    found = []
    for number in range(count):
        wanted = draw.randint(_LEAST_PROMPT, longest)
        most = (wanted - _LEAST_PROMPT) // _FACT_TOKENS + 1
        facts = draw.randint(-(-most // 3), most)
        steps = draw.randint(-(-facts // 2), facts)
        problem = make_problem(number, steps=steps, distractors=facts - steps)
        prompt, solution = (
            tokenizer.encode(text, add_special_tokens=False).ids
            for text in (problem.prompt, problem.solution)
        )
        # Something is left to write.
        found.append(prompt + solution[: min(wanted - len(prompt), len(solution) - 1)])
    return found


@contextmanager
def _engine(options: SoakOptions, longest: int, *, delta: bool) -> Iterator[Process]:
    """An engine's process, for as long as it is used."""
    side = "DELTA" if delta else "stock"
    process = Process(side, options.spec(longest, delta), options.worker)
    try:
        process.ready()
        yield process
    finally:
        process.kill()
