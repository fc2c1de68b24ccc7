"""Command line of the kernel benchmark."""

from typing import Annotated

import typer

import benchmarks.command as cli


def kernels(
    quick: Annotated[
        bool, typer.Option("--quick", help="Five shapes of heads 12/2, in two minutes.")
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
    base: cli.Base = None,
    base_source: cli.BaseSource = None,
    as_json: cli.Json = False,
    out: cli.Out = None,
    tag: cli.Tag = None,
) -> None:
    """Time decode attention on a CUDA GPU: dense, Δ, sparse and the selection, beside their peers.

    Peers are FlashAttention-3 (of vLLM) and FlashInfer where they are installed, and the measured
    bandwidth of the memory. Batches and contexts choose among those of a quick run, and replace
    those of a full one. With --base, the operations of both commits are timed instead, launched one
    by one and replayed from a CUDA graph.
    """
    with cli.checking(out, tag):
        from benchmarks.kernels.cases import grid, parse_heads
        from benchmarks.kernels.rows import kernel_table
        from benchmarks.kernels.run import compare_commits, run
        from benchmarks.report import table

        pairs = [parse_heads(text) for text in heads or []]
        shapes = grid(quick=quick, heads=pairs, batches=batch or [], contexts=context or [])
    command = cli.command_line(
        "kernels", quick=quick, heads=heads, batch=batch, context=context, memory_gib=memory_gib,
        base=base, base_source=base_source,
    )  # fmt: skip
    with cli.progress() as show:
        if base or base_source:
            result = compare_commits(shapes, base, base_source, command, progress=show)
        else:
            result = run(shapes, command=command, memory_gib=memory_gib, progress=show)
    if base or base_source:
        cli.deliver(result, out, tag, as_json, table)
    else:
        cli.deliver(result, out, tag, as_json, kernel_table, "benchmarks.kernels.figures")


if __name__ == "__main__":
    cli.launch(kernels)
