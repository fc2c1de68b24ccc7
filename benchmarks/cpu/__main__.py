"""Command line of the CPU benchmark."""

from typing import Annotated

import typer

import benchmarks.command as cli


def cpu(
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model, in seconds.")] = False,
    base: cli.Base = None,
    base_source: cli.BaseSource = None,
    as_json: cli.Json = False,
    out: cli.Out = None,
    tag: cli.Tag = None,
) -> None:
    """Time one decode step on the CPU, and its peak memory: stock Transformers and DELTA.

    A random model of the shape of Qwen2.5-0.5B, bfloat16 and float32, up to 32k tokens of context,
    both in turns in one run. Takes some minutes; needs 4 GiB of memory. With --base, steps of both
    commits are timed instead: stock (which should be equal), K ≥ N and DELTA.
    """
    with cli.checking(out, tag):
        from benchmarks.cpu.run import compare_commits, run
        from benchmarks.report import table

    command = cli.command_line("cpu", quick=quick, base=base, base_source=base_source)
    with cli.progress() as show:
        if base or base_source:
            result = compare_commits(base, base_source, command, quick=quick, progress=show)
        else:
            result = run(command=command, quick=quick, progress=show)
    cli.deliver(result, out, tag, as_json, table)


if __name__ == "__main__":
    cli.launch(cpu)
