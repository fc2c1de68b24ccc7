"""``deltadecode bench``: the benchmarks."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deltadecode.cli.output import (
    BadInput,
    check_tag,
    note,
    print_json,
    progress_bar,
    quiet_libraries,
    stdout,
    teller,
)

bench = typer.Typer(pretty_exceptions_enable=False)


@bench.callback(invoke_without_command=True)
def _bench(context: typer.Context) -> None:
    """Measure DELTA beside its peers."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@bench.command()
def cpu(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write cpu-<date>[-tag].json to.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Last part of the file's name.")] = None,
) -> None:
    """Time one decode step on the CPU, and its peak memory: stock Transformers and DELTA.

    A random model of the shape of Qwen2.5-0.5B, bfloat16 and float32, up to 32k tokens of context,
    both in turns in one run. Takes some minutes; needs 4 GiB of memory.
    """
    quiet_libraries()
    from benchmarks.cpu.run import run
    from deltadecode.lab.results import table, write_result

    check_tag(tag)
    _check_folder(out)
    with progress_bar("benchmark", 1.0) as (bar, task):
        found = run(progress=lambda case, done: bar.update(task, completed=done, description=case))
    if out is not None:
        note(f"wrote {write_result(found, out, tag)}")
    if as_json:
        print_json(found)
    else:
        stdout().print(table(found))


@bench.command()
def kernels(
    quick: Annotated[
        bool, typer.Option("--quick", help="Five shapes of heads 12/2, in under two minutes.")
    ] = False,
    heads: Annotated[
        list[str] | None, typer.Option(help="Query heads/KV heads, such as 12/2; repeatable.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequences of a step; repeatable.")
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a sequence; repeatable.")
    ] = None,
    memory_gib: Annotated[
        float | None,
        typer.Option(min=0.0, help="GPU memory for inputs; by default 60 % of what is free."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write kernels-<date>[-tag].json and its figure, .png, to."),
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Last part of the files' names.")] = None,
) -> None:
    """Time decode attention on a CUDA GPU: dense, Δ, sparse and the selection, beside their peers.

    Peers are FlashAttention-3 (of vLLM) and FlashInfer where they are installed, and the measured
    bandwidth of the memory. Batches and contexts choose among those of a quick run, and replace
    those of a full one.
    """
    quiet_libraries()
    from benchmarks.kernels.cases import grid, parse_heads
    from benchmarks.kernels.rows import kernel_table
    from benchmarks.kernels.run import command_line, run, write_kernels

    heads, batch, context = heads or [], batch or [], context or []
    try:
        check_tag(tag)
        pairs = [parse_heads(text) for text in heads]
        shapes = grid(quick=quick, heads=pairs, batches=batch, contexts=context)
    except ValueError as error:
        raise BadInput(str(error)) from error
    _check_folder(out)
    with progress_bar("benchmark", 1.0) as (bar, task):

        def tell(case: str, done: float) -> None:
            bar.update(task, completed=done, description=case)
            if bar.disable:
                note(f"{done:4.0%} {case}")

        command = command_line(quick, heads, batch, context, memory_gib)
        found = run(shapes, command=command, memory_gib=memory_gib, progress=tell)
    if out is not None:
        write_kernels(found, out, tag, note)
    if as_json:
        print_json(found)
    else:
        stdout().print(kernel_table(found))


@bench.command()
def e2e(
    shape: Annotated[
        str, typer.Option(help="Of the random model: r1-1.5b, qwen3-8b or tiny.")
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
        int, typer.Option(min=1, help="Rounds, each first stock and then DELTA.")
    ] = 3,
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
        bool, typer.Option("--start-together", help="Start both engines at once.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write e2e-<date>[-tag].json, as it grows, and its figure to."),
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Last part of the files' names.")] = None,
) -> None:
    """Time whole engines: stock vLLM and vLLM with DELTA, on the same workloads in one run.

    Random weights in the shape of a known model. headline: batch 64 from 4 to 18,432 tokens; step
    and short: one decode step; prefill: one batch of prompts; profile: kernels and graph launches
    of a step. With all workloads it takes about ten minutes on a large GPU.
    """
    quiet_libraries()
    from benchmarks.e2e.rows import e2e_table
    from benchmarks.e2e.run import finish, has_vllm, make_setup, run

    try:
        check_tag(tag)
        setup = make_setup(
            shape=shape,
            kinds=workload or [],
            points=point or [],
            steps=steps,
            rounds=rounds,
            plan=plan,
            memory_share=memory_share,
            in_turn=in_turn,
            start_together=start_together,
        )
    except ValueError as error:
        raise BadInput(str(error)) from error
    _check_folder(out)
    if not has_vllm():
        raise BadInput("vLLM is not installed: pip install 'deltadecode[vllm]'")
    with progress_bar("benchmark", 1.0) as (bar, task):

        def tell(case: str, done: float) -> None:
            bar.update(task, completed=done, description=case)
            if bar.disable:
                note(f"{done:4.0%} {case}")

        found = run(setup, out=out, tag=tag, progress=tell)
    if out is not None:
        finish(found, out, tag, note)
    if as_json:
        print_json(found)
    else:
        stdout().print(e2e_table(found))


@bench.command()
def calibration(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write calibration-<date>[-tag].json and its figure, .png, to."
        ),
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Last part of the files' names.")] = None,
    problems: Annotated[
        int, typer.Option(min=2, help="Half of them are fitted, half held out.")
    ] = 16,
) -> None:
    """Calibrate the embedded model: seconds, memory, and its plan among all others.

    The plan is compared with the paper's rule, hand-picked and random plans, and, by what it keeps
    of the attention to the other half of the problems, with every plan of its size.
    """
    quiet_libraries()
    from benchmarks.calibration.run import run
    from deltadecode.lab.results import write_with_figure

    check_tag(tag)
    _check_folder(out)
    with progress_bar("calibration", 1.0) as (bar, shown):
        tell = teller(bar, shown)
        command = shlex.join(["deltadecode", *sys.argv[1:]])
        found = run(command, lambda done, left: tell("calibration", done, left), problems)
    if out is not None:

        def figure(path: Path) -> None:
            from deltadecode.lab.calibration.figures import draw

            draw(found, path)

        write_with_figure(found, out, tag, figure, note)
    if as_json:
        print_json(found)
        return
    shown_rows = Table(title=f"{found['seconds']:.0f} s, {found['peak_mib']} MiB")
    for name in ("plan", "share lost", "ours", "ratio"):
        shown_rows.add_column(name)
    for line in found["rows"]:
        values = f"{line['theirs']:.4f}", f"{line['ours']:.4f}", f"{line['ratio']:.2f}×"
        shown_rows.add_row(line["peer"], *values)
    stdout().print(shown_rows)


def _check_folder(out: Path | None) -> None:
    if out is not None and out.exists() and not out.is_dir():
        raise BadInput(f"--out must be a folder, got {str(out)!r}")
