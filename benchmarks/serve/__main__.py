"""Command line of the load benchmark."""

import shlex
import signal
from pathlib import Path
from typing import Annotated

import typer

import benchmarks.command as cli
from benchmarks.variables import OPTION_HELP
from deltadecode.cli.output import note
from deltadecode.config import MOST_DRAFTS

Count = Annotated[int | None, typer.Option(min=1, help="Instead of the workload's own.")]


def serve(
    shape: Annotated[
        str, typer.Option(help="Model: r1-1.5b, qwen3-8b, smollm2 or tiny.")
    ] = "r1-1.5b",
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="reasoning, long-context, chat or shared-prefix; repeatable; default: all."
        ),
    ] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(
            help="Requests a second, inf, or such as 0.5x: of what stock served at inf; "
            "chat=0.5x is for one workload. Repeatable; default: inf, 0.5x, 0.8x."
        ),
    ] = None,
    requests: Count = None,
    concurrency: Count = None,
    input_len: Count = None,
    output_len: Count = None,
    prefix_len: Count = None,
    side: Annotated[str | None, typer.Option(help="stock or DELTA: run only this server.")] = None,
    server_flag: Annotated[
        list[str] | None,
        typer.Option(
            help="Flags of both servers, such as '--max-num-seqs 128'; repeatable.",
        ),
    ] = None,
    env: Annotated[list[str] | None, typer.Option(help=OPTION_HELP)] = None,
    plan: Annotated[
        Path | None, typer.Option(help="DeltaConfig as JSON; default: the shape's.")
    ] = None,
    raw: Annotated[
        Path, typer.Option(help="Folder of the single runs; a benchmark continues there.")
    ] = Path("build/load"),
    minutes: Annotated[
        float | None, typer.Option(help="Stop after so long; run again to go on.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Of every run; a row has the median one of each side.")
    ] = 1,
    start_together: Annotated[
        bool,
        typer.Option("--start-together", help="Start both at once, and let both live."),
    ] = False,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="DELTA only drafts, and full attention verifies.")
    ] = False,
    drafts: Annotated[
        int, typer.Option(min=1, max=MOST_DRAFTS, help="With --lossless, of a step.")
    ] = 4,
    acceptance: Annotated[
        float | None,
        typer.Option(help="With --lossless: of each draft, drawn; weights are random."),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing; make the result from the runs.")
    ] = False,
    docs: Annotated[
        Path | None,
        typer.Option(help="Run nothing; put the tables of --result into this page's eval:load."),
    ] = None,
    result: Annotated[
        list[Path] | None, typer.Option(help="With --docs: result file; repeatable.")
    ] = None,
    as_json: cli.Json = False,
    out: cli.Out = None,
    tag: cli.Tag = None,
) -> None:
    """Put load on real servers: vllm serve, stock and with DELTA, by vLLM's own bench serve.

    Random weights in the shape of a known model. One server after the other, each with all
    workloads and rates; or both alive, and each run first on stock and then with DELTA. Every run
    is a file in --raw, and a benchmark that was stopped goes on from there; a result has the runs
    that are there for both servers.
    """
    with cli.checking(out, tag):
        from benchmarks.e2e.run import need_vllm
        from benchmarks.serve.options import make_options
        from benchmarks.serve.report import fill, make_result, table
        from benchmarks.serve.run import Load, check_facts

        if (docs is None) != (not result):
            raise ValueError("--docs needs --result, and --result needs --docs")
        if docs is not None:
            fill(docs, result or [])
            return
        options = make_options(
            shape=shape, names=workload or [], rates=rate or [], requests=requests,
            concurrency=concurrency, input_len=input_len, output_len=output_len,
            prefix_len=prefix_len, side=side, plan=plan, raw=raw, minutes=minutes, rounds=rounds,
            start_together=start_together, lossless=lossless, drafts=drafts, acceptance=acceptance,
            flags=[word for text in server_flag or [] for word in shlex.split(text)],
            variables=env or [],
        )  # fmt: skip
        if not report:
            check_facts(options)
    if not report:
        need_vllm()
        # Whoever ends a benchmark does not mean to leave a server behind.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with cli.progress() as show:
            done = Load(options, note, show).run()
        note("all done" if done else "some runs are missing; the same command goes on")
    with cli.checking(out, tag):
        made = make_result(options)
    cli.deliver(made, out, tag, as_json, table, "benchmarks.serve.figure")


if __name__ == "__main__":
    cli.launch(serve)
