"""``deltadecode demo``: both halves of the claim, the answer kept and the time saved."""

from __future__ import annotations

import random
from typing import Annotated, Any

import typer
from rich.table import Table

from deltadecode.cli.demo_workers import NAMES, run
from deltadecode.cli.output import BadInput, note, print_json, stderr, stdout
from deltadecode.lab.tasks import make_problem, model_path

# The larger model: no shape is that of Qwen2.5-0.5B; the first pair of steps is not timed.
LARGER: dict[str, Any] = {"context": 16384, "shape": None, "pairs": 6}


def demo(
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the problem; default: a fresh one.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Length of the problem; default: 213.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Solve one long problem with full attention and with DELTA, and time a step of a larger model.

    The embedded model is small, so its steps are not bound by its cache: it shows the answer kept.
    The random model of the shape of Qwen2.5-0.5B shows the time saved.
    """
    chosen = random.SystemRandom().randrange(10**6) if seed is None else seed
    try:
        problem = make_problem(chosen) if steps is None else make_problem(chosen, steps=steps)
    except ValueError as error:
        raise BadInput(f"no problem of {steps} steps: {error}") from error
    note(
        f"seed {chosen}: {problem.facts} facts, {problem.steps} steps; full attention and DELTA "
        "run side by side, one process and one thread each"
    )
    task = {"model": str(model_path()), "seed": chosen, "steps": steps}
    full, delta, step = run(task, LARGER, stderr())
    if as_json:
        print_json(summary(chosen, full, delta, step))
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


def summary(
    seed: int, full: dict[str, Any], delta: dict[str, Any], step: dict[str, Any]
) -> dict[str, Any]:
    """Make the JSON object of the demo.

    Parameters
    ----------
    seed : int
        Of the problem.
    full, delta : dict
        See :func:`deltadecode.cli.demo_workers.run`.
    step : dict
        What a step of the larger model took.

    Returns
    -------
    dict
        ``correct``, ``answer`` and ``tokens_generated`` are DELTA's.
    """
    return {
        "seed": seed,
        "correct": delta["correct"],
        "same_answer": full["answer"] is not None and full["answer"] == delta["answer"],
        "tokens_generated": delta["tokens"],
        "attended_fraction": delta["attended_tokens"] / delta["full_tokens"],
        "seconds_full": full["seconds"],
        "seconds_delta": delta["seconds"],
        "answer": delta["answer"],
        "expected": delta["expected"],
        "correct_full": full["correct"],
        "answer_full": full["answer"],
        "tokens_generated_full": full["tokens"],
        "prompt_tokens": delta["prompt_tokens"],
        "attended_tokens": delta["attended_tokens"],
        "full_tokens": delta["full_tokens"],
        **step,
    }


def answers_table(full: dict[str, Any], delta: dict[str, Any]) -> Table:
    """Show both sides.

    Parameters
    ----------
    full, delta : dict
        See :func:`deltadecode.cli.demo_workers.run`.

    Returns
    -------
    rich.table.Table
        One line per side.
    """
    shown = Table()
    shown.add_column("")
    for name in ("answer", "right?", "tokens", "attended\ntokens", "seconds", "tok/s"):
        shown.add_column(name, justify="left" if name in ("answer", "right?") else "right")
    for side, found in ((False, full), (True, delta)):
        shown.add_row(
            NAMES[side],
            found["answer"] or "none",
            "yes" if found["correct"] else "no",
            f"{found['tokens']:,}",
            f"{found['attended_tokens']:,}",
            f"{found['seconds']:.1f}",
            f"{found['tokens'] / found['seconds']:.0f}",
        )
    return shown
