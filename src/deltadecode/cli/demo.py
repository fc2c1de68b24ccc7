"""``deltadecode demo``: both halves of the claim, the answer kept and the time saved."""

from __future__ import annotations

import random
from typing import Annotated, Any

import typer
from rich.table import Table

from deltadecode.cli import options
from deltadecode.cli.demo_workers import NAMES, run
from deltadecode.cli.output import BadInput, note, print_json, stderr, stdout
from deltadecode.lab.tasks import make_problem, model_path

# The larger model: no shape is that of Qwen2.5-0.5B; the first pair of steps is not timed.
LARGER: dict[str, Any] = {"context": 16384, "shape": None, "pairs": 6}


def demo(
    seed: options.FreshSeed = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Length of the problem; default: 213.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Solve one long problem with full attention and with DELTA, and time a step of a larger model.

    The embedded model is small, so its steps are not bound by its cache: it shows the answer kept.
    The random model of the shape of Qwen2.5-0.5B shows the time saved; --json leaves it out.
    """
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    folder = model_path()
    try:
        problem = make_problem(seed) if steps is None else make_problem(seed, steps=steps)
    except ValueError as error:
        raise BadInput(f"no problem of {steps} steps: {error}") from error
    note(
        f"seed {seed}: {problem.facts} facts, {problem.steps} steps; full attention and DELTA "
        "run side by side, one process and one thread each"
    )
    task = {"model": str(folder), "seed": seed, "steps": steps}
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
    table = Table()
    table.add_column("")
    for name in ("answer", "right?", "tokens", "attended\ntokens", "seconds", "tok/s"):
        table.add_column(name, justify="left" if name in ("answer", "right?") else "right")
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
