"""vLLM's own client, ``vllm bench serve``: its command line, and what it measures."""

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serve.server import NAME, Server, last_words, server_environment
from benchmarks.serve.workloads import Rate, Workload, seed
from deltadecode.cli.serve import vllm_command

METRICS = ("ttft", "tpot", "itl")
PERCENTILES = (50, 99)


class ClientError(RuntimeError):
    """The client failed or had no time; its message is one line."""


class OutOfTimeError(ClientError):
    """The time that a run was given is over."""


def bench_command(
    tokenizer: Path,
    port: int,
    workload: Workload,
    rate: Rate,
    number: int,
    per_second: float,
    result: Path,
) -> list[str]:
    """The command line of one run, at so many requests a second.

    ``rate`` and ``number``, which says how often it has come, choose the seed.
    """
    options: dict[str, Any] = {
        "model": NAME, "tokenizer": tokenizer, "host": "127.0.0.1", "port": port,
        "dataset-name": "random", "random-input-len": workload.prompt,
        "random-output-len": workload.output, "random-prefix-len": workload.prefix,
        "random-range-ratio": 0, "num-prompts": workload.requests,
        "max-concurrency": workload.concurrency, "request-rate": f"{per_second:g}",
        "seed": seed(workload, rate, number), "temperature": 0,
        # Its check sends a whole request first, which a long output makes take its time.
        "ready-check-timeout-sec": 0,
        "percentile-metrics": ",".join(METRICS),
        "metric-percentiles": ",".join(map(str, PERCENTILES)),
        "result-dir": result.parent, "result-filename": result.name,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    # Detailed: with the time to the first token of each request.
    flags = ["--ignore-eos", "--save-result", "--save-detailed", "--disable-tqdm"]
    return [*vllm_command(), "bench", "serve", *words, *flags]


def drive(
    server: Server,
    tokenizer: Path,
    workload: Workload,
    rate: Rate,
    number: int,
    per_second: float,
    folder: Path,
    seconds: float | None,
) -> dict[str, Any]:
    """Send a workload to a server, and give what the client and the server say about it."""
    part = (folder / "bench.part").resolve()
    part.unlink(missing_ok=True)
    command = bench_command(tokenizer, server.port, workload, rate, number, per_second, part)
    before = server.metrics()
    text = _run(command, folder, seconds)
    if not server.alive():
        raise server.failure("went away under load")
    if not part.exists():
        raise ClientError(f"vllm bench serve wrote no result: {last_words(text)}")
    after = server.metrics()
    measured = json.loads(part.read_text(encoding="utf-8"))
    part.unlink()
    why = re.search(r"^Error 0: (.*)$", text, re.MULTILINE)
    return {
        **values(measured, why[1] if why else "no reason given"),
        **server_values(before, after),
    }


def values(measured: dict[str, Any], why: str = "") -> dict[str, Any]:
    """What is kept of a result of ``vllm bench serve``; a ClientError if requests failed.

    ``why`` is what one of them got for an answer.
    ``tok_s`` is output tokens a second; times are in ms. ``arrivals`` are [when a request was sent,
    in seconds after the first one; its time to the first token].
    """
    completed, wanted = measured["completed"], measured["num_prompts"]
    if completed != wanted:
        raise ClientError(f"{wanted - completed} of {wanted} requests failed: {why}")
    kept: dict[str, Any] = {
        "tok_s": measured["output_throughput"],
        "requests_s": measured["request_throughput"],
        "duration_s": measured["duration"],
        "requests": completed,
        "input_tokens": measured["total_input_tokens"],
        "output_tokens": measured["total_output_tokens"],
    }
    for metric in METRICS:
        for percentile in PERCENTILES:
            kept[f"{metric}_p{percentile}"] = measured[f"p{percentile}_{metric}_ms"]
    if "ttfts" in measured and "start_times" in measured:
        first = min(measured["start_times"])
        each = zip(measured["start_times"], measured["ttfts"], strict=True)
        kept["arrivals"] = [[round(at - first, 3), round(1e3 * ttft, 1)] for at, ttft in each]
    if "spec_decode_acceptance_length" in measured:
        kept["acceptance_length"] = measured["spec_decode_acceptance_length"]
    return kept


def server_values(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """What a server counted during a run."""

    def gained(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    found: dict[str, Any] = {"preemptions": int(gained("vllm:num_preemptions_total"))}
    if queries := gained("vllm:prefix_cache_queries_total"):
        found["prefix_hits"] = round(gained("vllm:prefix_cache_hits_total") / queries, 4)
    if full := gained("deltadecode_full_tokens_total"):
        found["attended"] = round(gained("deltadecode_attended_tokens_total") / full, 4)
    return found


def _run(command: Sequence[str], folder: Path, seconds: float | None) -> str:
    log = folder / "bench.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            list(command), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=server_environment(folder),
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise OutOfTimeError(f"the run did not end within {seconds:.0f} s") from None
        finally:
            process.kill()
            process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    if code:
        raise ClientError(f"vllm bench serve ended with exit code {code}: {last_words(text)}")
    return text
