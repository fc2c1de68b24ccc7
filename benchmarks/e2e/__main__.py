"""Command line of the end-to-end benchmark."""

from pathlib import Path
from typing import Annotated

import typer

import benchmarks.command as cli
from benchmarks.variables import OPTION_HELP


def e2e(
    shape: Annotated[
        str, typer.Option(help="Model: r1-1.5b, qwen3-8b, smollm2 or tiny.")
    ] = "r1-1.5b",
    workload: Annotated[
        list[str] | None,
        typer.Option(help="headline, step, short, prefill or profile; repeatable; default: all."),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(help="batch:context, such as 64:8192, for all workloads; repeatable."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps of a round.")] = 64,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Each stock and DELTA; default: 3, of a headline 1. A profile has one."
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="DeltaConfig as JSON; default: the shape's.")
    ] = None,
    memory_share: Annotated[
        float | None,
        typer.Option(help="Of the device, for each engine; default: 0.42, or 0.85 in turn."),
    ] = None,
    in_turn: Annotated[
        bool, typer.Option("--in-turn", help="One engine after the other, where two do not fit.")
    ] = False,
    start_together: Annotated[
        bool, typer.Option("--start-together", help="Start both at once.")
    ] = False,
    drafts: Annotated[
        int, typer.Option(min=0, help="That each step verifies, of each sequence.")
    ] = 0,
    lossless: Annotated[
        bool,
        typer.Option("--lossless", help="DELTA makes these drafts; stock vLLM decodes without."),
    ] = False,
    acceptance: Annotated[
        float | None,
        typer.Option(help="Of each draft, drawn by vLLM; weights are random."),
    ] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="Of both engines: auto, as the weights, or fp8.")
    ] = "auto",
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="GPUs of each engine, which share every layer.")
    ] = 1,
    sync_heads: Annotated[
        bool, typer.Option("--sync-heads", help="Their ranks select pages together.")
    ] = False,
    worker_process: Annotated[
        bool,
        typer.Option(
            "--worker-process",
            help="One for the worker of each engine, as by --distributed-executor-backend mp.",
        ),
    ] = False,
    env: Annotated[list[str] | None, typer.Option(help=OPTION_HELP)] = None,
    as_json: cli.Json = False,
    out: cli.Out = None,
    tag: cli.Tag = None,
) -> None:
    """Time whole engines: stock vLLM and vLLM with DELTA, on the same workloads in one run.

    Random weights in the shape of a known model. headline: batch 64 from 4 to 18,432 tokens; step
    and short: one decode step; prefill: one batch of prompts; profile: kernels and graph launches
    of a step. With all workloads it takes about ten minutes on a large GPU. The result file grows
    with every measurement.
    """
    with cli.checking(out, tag):
        from benchmarks.e2e.rows import e2e_table
        from benchmarks.e2e.run import make_options, need_vllm, run

        options = make_options(
            shape=shape, kinds=workload or [], points=point or [], steps=steps, rounds=rounds,
            plan=plan, memory_share=memory_share, in_turn=in_turn, start_together=start_together,
            drafts=drafts, kv_cache_dtype=kv_cache_dtype, tensor_parallel=tensor_parallel,
            sync_heads=sync_heads, worker_process=worker_process, lossless=lossless,
            acceptance=acceptance, variables=env or [],
        )  # fmt: skip
    need_vllm()
    with cli.progress() as show:
        result = run(options, out=out, tag=tag, progress=show)
    cli.deliver(result, out, tag, as_json, e2e_table, "benchmarks.e2e.figure")


if __name__ == "__main__":
    cli.launch(e2e)
