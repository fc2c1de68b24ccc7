"""Command line of the comparison of policies."""

import time
from pathlib import Path
from typing import Annotated

import typer

import benchmarks.command as cli


def policies(
    model: Annotated[str, typer.Option(help="Folder or name of a model.")] = "smollm2",
    samples: Annotated[
        Path, typer.Option(help="Folder of the samples; a run continues there.")
    ] = Path("samples"),
    plan: Annotated[
        Path | None, typer.Option(help="Plan of deltadecode calibrate, as one more policy.")
    ] = None,
    budget: Annotated[int, typer.Option(min=1, help="Tokens a sparse layer may read.")] = 512,
    problems: Annotated[int, typer.Option(min=1, help="Of each task and context.")] = 100,
    pieces: Annotated[int, typer.Option(min=1, help="Of each text and context.")] = 4,
    context: Annotated[
        list[int] | None, typer.Option(help="Tokens of a prompt. Default: 4000, 2000, 7500.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="needle, multi-key, tracking, docs or code. Default: all."),
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="Part of a policy's name. Default: all.")
    ] = None,
    shard: Annotated[
        str, typer.Option(help="I/N: each N-th policy from the I-th on, for processes at a time.")
    ] = "0/1",
    batch: Annotated[int, typer.Option(min=1, help="Problems decoded together.")] = 50,
    minutes: Annotated[
        float | None, typer.Option(help="Stop after so long; run again to go on.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of problems. Default: bfloat16 on a GPU, else float32, as for texts."),
    ] = None,
    device: Annotated[str, typer.Option(help="As PyTorch names it.")] = "auto",
    chat: Annotated[bool, typer.Option("--chat", help="Take the chat template.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing; make the result from the samples.")
    ] = False,
    docs: Annotated[
        Path | None, typer.Option(help="With --report and --out: page whose table is replaced.")
    ] = None,
    as_json: cli.Json = False,
    out: cli.Out = None,
    tag: cli.Tag = None,
) -> None:
    """Compare DELTA with its peers on a real model, at one budget: needles, tracking, texts.

    Every sample is a line in --samples, and a run that was stopped goes on from there.
    """
    start = time.monotonic()
    with cli.checking(out, tag):
        from benchmarks.policies.report import make_result
        from benchmarks.policies.run import Comparison
        from benchmarks.policies.tables import fill, table
        from deltadecode.lab.results import write_result

        if docs is not None and (out is None or not report):
            raise ValueError("--docs needs --report and --out")
        tasks, contexts, numbers = _checked(task, context, shard)
    if not report:
        from deltadecode.cli.loading import (
            find_device,
            load_config,
            load_model,
            load_tokenizer,
            make_plan,
            resolve_model,
        )
        from deltadecode.cli.output import note

        folder, where = resolve_model(model), find_device(device)
        given = None if plan is None else make_plan(load_config(folder), plan, {})
        comparison = Comparison(
            lambda dtype: load_model(folder, dtype, where), load_tokenizer(folder), samples,
            dtype=dtype or ("float32" if where.type == "cpu" else "bfloat16"), budget=budget,
            plan=given, samples=problems, pieces=pieces, batch=batch, chat=chat,
            wanted=policy or (), shard=numbers, contexts=contexts, tasks=tasks,
            deadline=None if minutes is None else start + 60 * minutes,
        )  # fmt: skip
        with cli.progress() as show:
            done = comparison.run(show)
        note("all done" if done else "time is over; the same command goes on")
        return
    command = cli.command_line("policies", model=model, budget=budget, problems=problems,
                               pieces=pieces, chat=chat)  # fmt: skip
    with cli.checking(out, tag):
        result = make_result(samples, command)
    if docs is not None and out is not None:
        path = write_result(result, out, tag)
        fill(docs, result, path, path.with_suffix(".png"))
    cli.deliver(result, out, tag, as_json, table, "benchmarks.policies.figure")


def _checked(
    task: list[str] | None, context: list[int] | None, shard: str
) -> tuple[list[str], list[int], tuple[int, int]]:
    from benchmarks.policies.cases import CONTEXTS, TASKS

    for name in task or ():
        if name not in TASKS:
            raise ValueError(f"--task must be one of {', '.join(TASKS)}, got {name!r}")
    first, sign, count = shard.partition("/")
    if not (sign and first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise ValueError(f"--shard must be I/N with I < N, got {shard!r}")
    return task or list(TASKS), context or list(CONTEXTS), (int(first), int(count))


if __name__ == "__main__":
    cli.launch(policies)
