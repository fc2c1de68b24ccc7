"""``deltadecode bench``: the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from deltadecode.cli.output import (
    BadInput,
    note,
    print_json,
    progress_bar,
    quiet_libraries,
    stdout,
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
    from deltadecode.benchmark.cpu import run
    from deltadecode.benchmark.results import check_tag, table, write_result

    try:
        check_tag(tag)
    except ValueError as error:
        raise BadInput(str(error)) from error
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
    from deltadecode.benchmark.kernel_cases import grid, parse_heads
    from deltadecode.benchmark.kernel_rows import kernel_table
    from deltadecode.benchmark.kernels import command_line, run, write_kernels
    from deltadecode.benchmark.results import check_tag

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
        str, typer.Option(help="r1-1.5b, qwen3-8b or tiny (random weights), or a model's folder.")
    ] = "r1-1.5b",
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 64,
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens before the timed steps; repeatable."),
    ] = None,
    decode_to: Annotated[
        int | None, typer.Option(min=8, help="Also decode short prompts to this length.")
    ] = None,
    steps: Annotated[int, typer.Option(min=8, help="Steps that a median is taken of.")] = 128,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also list the kernels of a step (GPU).")
    ] = False,
    config: Annotated[
        str, typer.Option(help="JSON: budget and layers of DELTA; see docs/vllm.md.")
    ] = "{}",
    engine: Annotated[
        str, typer.Option(help="JSON: more arguments of vllm.LLM, for both sides.")
    ] = "{}",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write e2e-<date>[-tag].json and its figure, .png, to."),
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Last part of the files' names.")] = None,
) -> None:
    """Time vLLM with stock attention and with DELTA: prefill, decode steps, long decodes.

    Each side runs in a process of its own, with the same engine and work. Takes minutes; needs
    vLLM, and a GPU to mean something.
    """
    quiet_libraries()
    from deltadecode.benchmark.e2e import Work, command_line, run, write_e2e
    from deltadecode.benchmark.results import check_tag, table, write_result

    contexts = tuple(context or Work.contexts)
    try:
        check_tag(tag)
    except ValueError as error:
        raise BadInput(str(error)) from error
    _check_folder(out)
    settings = _json_object("--config", config), _json_object("--engine", engine)
    work = Work(shape, batch, contexts, decode_to, steps, profile, *settings)
    with progress_bar("benchmark", 1.0) as (bar, task):

        def tell(case: str, done: float) -> None:
            bar.update(task, completed=done, description=case)
            if bar.disable:
                note(f"{done:4.0%} {case}")

        def keep(found: dict[str, Any]) -> None:
            if out is not None:
                write_result(found, out, tag)

        try:
            found = run(work, command_line(work), progress=tell, keep=keep)
        except ValueError as error:
            raise BadInput(str(error)) from error
    if out is not None:
        write_e2e(found, out, tag, note)
    if as_json:
        print_json(found)
    else:
        stdout().print(table(found))


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise BadInput(f"{name} must be a JSON object, got {text!r}") from error
    if not isinstance(value, dict):
        raise BadInput(f"{name} must be a JSON object, got {text!r}")
    return value


def _check_folder(out: Path | None) -> None:
    if out is not None and out.exists() and not out.is_dir():
        raise BadInput(f"--out must be a folder, got {str(out)!r}")
