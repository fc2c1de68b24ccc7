"""``deltadecode demo``: both halves of the claim, the answer kept and the time saved."""

from __future__ import annotations

import math
import random
from typing import Annotated, Any

import typer
from rich.table import Table

from deltadecode.cli import loading, options
from deltadecode.cli.demo_workers import NAMES, run
from deltadecode.cli.output import BadInput, note, print_json, stderr, stdout
from deltadecode.lab.tasks import make_problem

# The larger model: no shape is that of Qwen2.5-0.5B; the first pair of steps is not timed.
LARGER: dict[str, Any] = {"context": 16384, "shape": None, "pairs": 6}


def demo(
    model: Annotated[
        str, typer.Option(help=f"'{options.EMBEDDED}', or the real model '{options.SMOLLM2}'.")
    ] = options.EMBEDDED,
    seed: options.FreshSeed = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Length of the problem; default: 213.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Solve one long problem with full attention and with DELTA, and time a step of a larger model.

    The embedded model is small, so its steps are not bound by its cache: it shows the answer kept.
    The random model of the shape of Qwen2.5-0.5B shows the time saved; --json leaves it out.
    With --model smollm2, a real model reads 3,800 tokens of Python's documentation: both sides show
    their loss on its next tokens, and answer a question about it.
    """
    if model == options.SMOLLM2:
        if seed is not None or steps is not None:
            raise BadInput(f"--seed and --steps go with --model {options.EMBEDDED} only")
        _real(as_json)
    elif model == options.EMBEDDED:
        _problem(seed, steps, as_json)
    else:
        raise BadInput(
            f"--model must be {options.EMBEDDED} or {options.SMOLLM2} here, got {model!r}"
        )


def _problem(seed: int | None, steps: int | None, as_json: bool) -> None:
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    folder = loading.named_folder(options.EMBEDDED)
    try:
        problem = make_problem(seed) if steps is None else make_problem(seed, steps=steps)
    except ValueError as error:
        raise BadInput(f"no problem of {steps} steps: {error}") from error
    note(
        f"seed {seed}: {problem.facts} facts, {problem.steps} steps; full attention and DELTA "
        "run side by side, one process and one thread each"
    )
    task = {"kind": "problem", "model": folder, "seed": seed, "steps": steps}
    full, delta, step = run(task, None if as_json else LARGER, stderr())
    if step is None:
        print_json(summary(full, delta))
        return
    console = stdout()
    console.print(answers_table(full, delta))
    fraction = delta["attended_tokens"] / delta["full_tokens"]
    console.print(
        f"The answer is {delta['expected']}; DELTA attended to {fraction:.1%} of the tokens.",
        markup=False,
    )
    console.print()
    console.print(
        f"One decode step of a random model of the shape of Qwen2.5-0.5B (bfloat16, "
        f"{step['step_context']:,} tokens\nin its cache, {step['threads']} threads): "
        f"full attention {step['step_ms_full']:.0f} ms, DELTA {step['step_ms_delta']:.0f} ms, "
        f"{step['step_speedup']:.2f}×",
        markup=False,
        soft_wrap=True,
    )


def _real(as_json: bool) -> None:
    folder = loading.named_folder(options.SMOLLM2)
    note(
        "SmolLM2-135M-Instruct reads Python's documentation; full attention and DELTA run side by "
        "side, one process and one thread each"
    )
    full, delta, _ = run({"kind": "text", "model": folder}, None, stderr())
    if as_json:
        print_json(text_summary(full, delta))
        return
    console = stdout()
    console.print(losses_table(full, delta))
    fraction = delta["attended_tokens"] / delta["full_tokens"]
    for line in (
        f"Text: {full['context_tokens']:,} tokens of the documentation of pdb; the loss is the "
        f"mean over its next {full['scored_tokens']} tokens.",
        f"Question: {full['question']} The answer is {full['expected']}.",
        *(f"{NAMES[is_delta]}: {side['beginning']} {side['text']}"
          for is_delta, side in ((False, full), (True, delta))),
        f"DELTA attended to {fraction:.1%} of the tokens.",
    ):  # fmt: skip
        console.print(line, markup=False, soft_wrap=True)


def text_summary(full: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of a real model: :func:`summary`, the losses (nats a token) and the text."""
    return {
        **summary(full, delta),
        "loss_full": full["loss"],
        "loss_delta": delta["loss"],
        "perplexity_ratio": math.exp(delta["loss"] - full["loss"]),
        **{key: delta[key] for key in ("scored_tokens", "context_tokens", "question")},
        "text_full": full["text"],
        "text_delta": delta["text"],
    }


def summary(full: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
    """The JSON object; ``correct``, ``answer`` and ``tokens_generated`` are DELTA's."""
    return {
        "correct": delta["correct"],
        "same_answer": full["answer"] is not None and full["answer"] == delta["answer"],
        "tokens_generated": delta["tokens"],
        "attended_fraction": delta["attended_tokens"] / delta["full_tokens"],
        "seconds_full": full["seconds"],
        "seconds_delta": delta["seconds"],
        "answer": delta["answer"],
        "expected": delta["expected"],
    }


def answers_table(full: dict[str, Any], delta: dict[str, Any]) -> Table:
    """One line a side."""
    table = _table("answer", "right?", "tokens", "attended\ntokens", "seconds", "tok/s")
    for is_delta, solved in ((False, full), (True, delta)):
        table.add_row(
            NAMES[is_delta],
            solved["answer"] or "none",
            "yes" if solved["correct"] else "no",
            f"{solved['tokens']:,}",
            f"{solved['attended_tokens']:,}",
            f"{solved['seconds']:.1f}",
            f"{solved['tokens'] / solved['seconds']:.0f}",
        )
    return table


def losses_table(full: dict[str, Any], delta: dict[str, Any]) -> Table:
    """One line a side, of a real model."""
    table = _table("answer", "right?", "loss", "perplexity", "attended\ntokens", "seconds")
    for is_delta, side in ((False, full), (True, delta)):
        table.add_row(
            NAMES[is_delta],
            side["answer"] or "none",
            "yes" if side["correct"] else "no",
            f"{side['loss']:.3f}",
            f"{math.exp(side['loss']):.2f}",
            f"{side['attended_tokens']:,}",
            f"{side['seconds']:.1f}",
        )
    return table


def _table(*names: str) -> Table:
    table = Table()
    table.add_column("")
    for name in names:
        table.add_column(name, justify="left" if name in ("answer", "right?") else "right")
    return table
