"""Command line of the memory benchmark."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import benchmarks.command as cli
from deltadecode.cli.output import BadInput


def memory(
    shape: Annotated[
        str, typer.Option(help="Model: r1-1.5b, qwen3-8b, smollm2 or tiny.")
    ] = "qwen3-8b",
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequences; repeatable. Default: 1.")
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of each; repeatable. Default: 32768.")
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Decode steps of each cache in a round, at most.")
    ] = 24,
    rounds: Annotated[
        int, typer.Option(min=1, help="Turns of each cache, there and back again.")
    ] = 3,
    selections: Annotated[
        Path | None,
        typer.Option(help="Result of --record, whose fetches a second run of DELTA repeats."),
    ] = None,
    longest: Annotated[
        list[float] | None,
        typer.Option(
            min=0.001, help="Also: the longest context on a GPU of so many GB; repeatable."
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="DeltaConfig as JSON; default: the shape's.")
    ] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help="Of DELTA's own caches: int8; default: the model's type.")
    ] = None,
    layer_graphs: Annotated[
        bool,
        typer.Option("--layer-graphs", help="DELTA's own caches decode with layer graphs."),
    ] = False,
    prompt_chunk: Annotated[
        int | None,
        typer.Option(
            min=1, help="Instead: whole prompts of --context tokens in chunks of so many."
        ),
    ] = None,
    gather: Annotated[
        bool,
        typer.Option(help="Pages are fetched by a kernel; --no-gather: gathered by the CPU."),
    ] = True,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="Beside the offloaded cache: delta, stock, stock-offloaded. Default: all."
        ),
    ] = None,
    record: Annotated[
        str | None,
        typer.Option(help="Instead: record the fetches of this model on real texts, on the CPU."),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(help="Instead: what 8-bit keys and values lose in this model, on the CPU."),
    ] = None,
    eight_bits: Annotated[
        str | None,
        typer.Option(help="Instead: what caches of kv_dtype lose in this model, on the CPU."),
    ] = None,
    budget: Annotated[
        list[int] | None,
        typer.Option(min=1, help="With a model: K, in pages; repeatable. Default: the shape's."),
    ] = None,
    texts: Annotated[int, typer.Option(min=1, help="With a model: pieces of a text.")] = 2,
    file: Annotated[
        Path | None, typer.Option(help="With a model: a text; default: Python's topics of help.")
    ] = None,
    as_json: cli.Json = False,
    out: cli.Out = None,
    tag: cli.Tag = None,
) -> None:
    """Time decode steps of Transformers from four kinds of caches, and count their bytes.

    Random weights in the shape of a known model, on one GPU. Caches are filled with random keys,
    without a prompt. Random weights select nearly at random, which is the worst case for an
    offloaded cache; with --selections a walk that changes as many pages as a real model's replaces
    what is selected.
    """
    with cli.checking(out, tag):
        from benchmarks.e2e.shapes import find_shape
        from benchmarks.memory.caches import PEERS
        from deltadecode.config import DeltaConfig

        for name in peer or ():
            if name not in PEERS:
                raise BadInput(f"--peer must be one of {', '.join(PEERS)}, got {name!r}")
        if kv_dtype not in (None, "int8"):
            raise BadInput(f"--kv-dtype must be int8, got {kv_dtype!r}")
        known = find_shape(shape)
        cfg = known.plan if plan is None else DeltaConfig.load(plan)
        cfg.layer_plan(known.layers)
    named = {"record": record, "rounding": rounding, "eight_bits": eight_bits}
    if any(named.values()):
        timed = {
            "--layer-graphs": layer_graphs, "--prompt-chunk": prompt_chunk, "--peer": peer,
            "--no-gather": not gather, "--batch": batch, "--selections": selections,
            "--longest": longest, "--kv-dtype": kv_dtype,
        }  # fmt: skip
        _refuse(timed, "is for steps that are timed, not for a model's texts")
        given = {
            "shape": shape, **named, "context": context, "budget": budget, "texts": texts,
            "steps": steps, "file": file, "plan": plan,
        }  # fmt: skip
        _read_texts(given, cfg, as_json, out, tag)
        return
    if prompt_chunk is not None:
        of_filled = {"--batch": batch, "--selections": selections}
        _refuse(of_filled, "is for caches that are filled without a prompt")
    with cli.checking(out, tag):
        import torch

        from benchmarks.memory.rows import memory_table
        from benchmarks.memory.run import Options, run
        from benchmarks.memory.selections import load_record

        options = Options(
            shape=known, plan=cfg, batches=batch or [1], contexts=context or [32768], steps=steps,
            rounds=rounds, longest=longest or [], kv_dtype=kv_dtype, layer_graphs=layer_graphs,
            prompt_chunk=prompt_chunk, gather=gather, peers=tuple(dict.fromkeys(peer or PEERS)),
            command=cli.command_line(
                "memory", shape=shape, batch=batch, context=context, steps=steps, rounds=rounds,
                selections=selections, longest=longest, plan=plan, kv_dtype=kv_dtype,
                layer_graphs=layer_graphs, prompt_chunk=prompt_chunk, no_gather=not gather,
                peer=peer,
            ),
        )  # fmt: skip
        if selections is not None:
            found = load_record(selections, cfg)
            options.missed = found["missed"]
            options.selections = {"file": selections.name, "case": found["case"]}
    if not torch.cuda.is_available() and shape != "tiny":
        raise BadInput(f"--shape {shape} needs a CUDA GPU; without one there is --shape tiny")
    with cli.checking(out, tag), cli.progress() as show:
        result = run(options, progress=show)
    cli.deliver(result, out, tag, as_json, memory_table)


def _refuse(options: dict[str, Any], why: str) -> None:
    for name, given in options.items():
        if given:
            raise BadInput(f"{name} {why}")


def _read_texts(
    given: dict[str, Any], cfg: Any, as_json: bool, out: Path | None, tag: str | None
) -> None:
    """Lead a real model along texts: --record, --rounding or --eight-bits."""
    measured = next(name for name in ("record", "rounding", "eight_bits") if given[name])
    model = given[measured]
    with cli.checking(out, tag), cli.progress() as show:
        import torch

        from benchmarks.memory.eight_bits import eight_bit_losses
        from benchmarks.memory.rounding import losses
        from benchmarks.memory.rows import memory_table
        from benchmarks.memory.selections import record
        from deltadecode.cli.loading import load_model, load_tokenizer, resolve_model
        from deltadecode.config import DeltaConfig
        from deltadecode.lab.results import result

        folder = resolve_model(model)
        loaded = load_model(folder, "float32", torch.device("cpu"))
        own = DeltaConfig.for_model(loaded)
        plans = [
            replace(
                cfg, budget_pages=pages, dense_layers=own.dense_layers,
                delta_layers=own.delta_layers,
            )
            for pages in given["budget"] or [cfg.budget_pages]
        ]  # fmt: skip
        run = {"record": record, "rounding": losses, "eight_bits": eight_bit_losses}[measured]
        rows = run(
            loaded, load_tokenizer(folder), plans, given["context"] or [4000],
            texts=given["texts"], steps=given["steps"], file=str(given["file"] or ""),
            progress=show,
        )  # fmt: skip
    # A path becomes its last part: results name no folder.
    shown = {**given, measured: Path(model).name}
    made = result("memory", cli.command_line("memory", **shown), rows)
    cli.deliver(made | {"model": Path(model).name}, out, tag, as_json, memory_table)


if __name__ == "__main__":
    cli.launch(memory)
