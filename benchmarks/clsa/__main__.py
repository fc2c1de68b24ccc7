"""Command line of the CLSA benchmark."""

from typing import Annotated

import typer

import benchmarks.command as cli


def clsa(
    context: Annotated[
        list[int] | None, typer.Option(min=2, help="Tokens of a sequence; repeatable.")
    ] = None,
    mode: Annotated[list[str] | None, typer.Option(help="Only these modes; repeatable.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batches to try for decoding; repeatable.")
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Of a context, tokens that are new.")
    ] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps of one timing.")] = 20,
    small: Annotated[bool, typer.Option(help="A tiny shape, to try the command.")] = False,
    device: Annotated[str, typer.Option(help="As PyTorch names it.")] = "cuda",
    vllm: Annotated[bool, typer.Option(help="Time vLLM's engine, on what it runs on.")] = False,
    as_json: cli.Json = False,
    out: cli.Out = None,
    tag: cli.Tag = None,
) -> None:
    """Time prefill and decoding of the paper's 4 B shape with random weights, mode by mode.

    Each mode at its own best batch of those that fit. A step is one CUDA graph. End to end is
    computed from both: a prompt of context less the new tokens, then those.
    """
    with cli.checking(out, tag):
        from benchmarks.clsa.run import MODES, Task, run
        from benchmarks.e2e.run import need_vllm
        from benchmarks.report import table

        contexts, modes = context or [8192, 32768, 131072], mode or list(MODES)
        task = Task(contexts, modes, batch or [1, 2, 4, 8, 16, 32, 64, 128, 256], new_tokens,
                    steps, small, device, vllm)  # fmt: skip
        task.check()
    if vllm:
        need_vllm()
    command = cli.command_line(
        "clsa", context=task.contexts, mode=mode, batch=batch, new_tokens=new_tokens, steps=steps,
        small=small, device=device, vllm=vllm,
    )  # fmt: skip
    with cli.progress() as show:
        result = run(command, task, show)
    cli.deliver(result, out, tag, as_json, table)


if __name__ == "__main__":
    cli.launch(clsa)
