"""Command line of the benchmark of lossless mode."""

from functools import partial
from typing import Annotated, Literal

import typer

import benchmarks.command as cli
from deltadecode.config import MOST_DRAFTS


def lossless(
    model: Annotated[str, typer.Option(help="Folder or name of a model.")] = "embedded",
    context: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a prompt. Default: 4000.")
    ] = None,
    budget: Annotated[
        list[int] | None, typer.Option(min=1, help="Pages that a draft may read. Default: 64.")
    ] = None,
    draft_tokens: Annotated[
        list[int] | None,
        typer.Option(min=0, max=MOST_DRAFTS, help="Before a verification; 0: as pays. Default: 4."),
    ] = None,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens of a page.")] = 16,
    texts: Annotated[int, typer.Option(min=1, help="Prompts for each context.")] = 5,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens of each prompt.")] = 200,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Instead: count equal tokens, in ragged batches of so many."),
    ] = None,
    engine: Annotated[
        Literal["transformers", "vllm"], typer.Option(help="That decodes; vllm with --batch only.")
    ] = "transformers",
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="That decodes single texts.")
    ] = "cpu",
    static: Annotated[
        bool, typer.Option("--static", help="Single texts from static caches, second runs timed.")
    ] = False,
    as_json: cli.Json = False,
    out: cli.Out = None,
    tag: cli.Tag = None,
) -> None:
    """Decode greedily in lossless mode and with full attention, in float32."""
    with cli.checking(out, tag):
        from benchmarks.lossless import batches, run
        from benchmarks.lossless.asked import Asked
        from benchmarks.report import table
        from deltadecode.cli.loading import resolve_model

        asked = Asked(
            resolve_model(model), context or [4000], budget or [64], draft_tokens or [4],
            page_size, texts, tokens, device, static,
        )  # fmt: skip
        if batch is not None and (static or device != "cpu"):
            raise ValueError("--static and --device are for single texts, got --batch")
        if engine == "vllm" and (batch is None or 0 in asked.drafts):
            raise ValueError("--engine vllm needs --batch, and --draft-tokens of at least 1")
    command = cli.command_line(
        "lossless", model=model, context=asked.contexts, budget=asked.budgets,
        draft_tokens=asked.drafts, page_size=page_size, texts=texts, tokens=tokens, batch=batch,
        engine=None if engine == "transformers" else engine,
        device=None if device == "cpu" else device, static=static or None,
    )  # fmt: skip
    measure = run.run if batch is None else partial(batches.run, batch=batch, engine=engine)
    with cli.checking(out, tag), cli.progress() as show:
        result = measure(asked, command=command, progress=show)
    cli.deliver(result, out, tag, as_json, table)


if __name__ == "__main__":
    cli.launch(lossless)
