"""Command line of the soak."""

import sys
from typing import Annotated

import typer

import benchmarks.command as cli
from deltadecode.cli.output import complain


def soak(
    requests: Annotated[int, typer.Option(min=1, help="In all, a third of them aborted.")] = 10_000,
    minutes: Annotated[
        float | None, typer.Option(help="End after so many of requests all the same.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once, at most.")] = 16,
    prompts: Annotated[int, typer.Option(min=1, help="Distinct prompts.")] = 64,
    input_len: Annotated[int, typer.Option(min=38, help="Tokens of a prompt, at most.")] = 192,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 32,
    blocks: Annotated[
        int | None,
        typer.Option(min=1, help="Of the KV cache; few make the engine preempt. Default: all."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Default: bfloat16 on a GPU, else float32.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Nats by which a token may lose. Default: 0.0001, in bfloat16 1."),
    ] = None,
    memory_share: Annotated[float, typer.Option(help="Of the device.")] = 0.85,
    seed: Annotated[int, typer.Option(help="Of lengths, arrivals and aborts.")] = 0,
    as_json: cli.Json = False,
    out: cli.Out = None,
    tag: cli.Tag = None,
) -> None:
    """Run many requests of the embedded model through vLLM with DELTA, and abort a third of them.

    The plan reads every page, so every answer must have the tokens of stock vLLM. After it all
    blocks of the cache must be free, and the memory as large as before; else the exit code is 1.
    """
    with cli.checking(out, tag):
        from benchmarks.e2e.run import need_vllm
        from benchmarks.soak.report import table
        from benchmarks.soak.run import make_options, random_prompts
        from benchmarks.soak.run import soak as run_soak

        options = make_options(
            requests=requests, minutes=minutes, concurrency=concurrency, prompts=prompts,
            input_len=input_len, tokens=output_len, blocks=blocks, dtype=dtype,
            tolerance=tolerance, memory_share=memory_share, seed=seed,
        )  # fmt: skip
    need_vllm()
    with cli.progress() as show:
        result = run_soak(options, random_prompts(prompts, input_len, seed), show)
    cli.deliver(result, out, tag, as_json, table)
    for failure in result["failures"]:
        complain(failure)
    if result["failures"]:
        sys.exit(1)


if __name__ == "__main__":
    cli.launch(soak)
