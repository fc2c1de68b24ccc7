"""Rows and table of the end-to-end benchmark, from what the engines measured."""

from collections.abc import Sequence
from statistics import fmean, median, quantiles
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.e2e.workloads import HEADLINE_PROMPT, Workload
from deltadecode.config import DeltaConfig
from deltadecode.lab.results import rounded, row

PEER = "vllm"
_CURVE_POINTS = 64
_WINDOW = 64  # steps of which a point of the curve is the median
Rounds = Sequence[dict[str, Any]]


def make_row(
    workload: Workload, ours: Rounds, theirs: Rounds, opening: Rounds, plan: DeltaConfig
) -> dict[str, Any]:
    """Make the row of one workload, from what both engines answered, one per round.

    ``opening`` is what both answered before, for its preemptions. Values are medians over all steps
    of all rounds, or over the rounds; of lossless steps all of a round count together, by the
    tokens that they gave, and ``steps_ours`` are all of them in ms. With drafts,
    ``tokens_a_step_ours`` has what a step gave each sequence in each round: its own token and
    the drafts that were accepted. ``within_budget``: whether
    every sparse layer reads all there is, so that nothing can be gained. A headline has ``tok_s``,
    the seconds of its ``rounds``, and a ``curve`` of [context, ms of a step], the first round's,
    for either side. ``waited`` is the part of the time in which an engine's Python had nothing to
    do but to wait for the device, or for a worker in another process: near 0, that Python is the
    limit.
    """
    shared = {
        "kind": workload.kind,
        "batch": workload.batch,
        "context": workload.context,
        "kv_cache_dtype": workload.kv_cache_dtype,
        "within_budget": plan.reads_all(workload.context),
        "preemptions": sum(one["preemptions"] for one in (*opening, *ours, *theirs)),
        "waited_ours": _waited(ours),
        "waited_theirs": _waited(theirs),
    }
    if workload.drafts:
        shared |= {"drafts": workload.drafts, "synthetic_acceptance": workload.acceptance}
    if workload.kind == "profile":
        shared |= {"profile_ours": ours[0], "profile_theirs": theirs[0]}
        busy = ours[0]["busy_us"] / 1e3, theirs[0]["busy_us"] / 1e3
        return row(workload.case, PEER, workload.unit, *busy, **shared)
    if workload.kind in ("step", "short"):
        return _step_row(workload, ours, theirs, shared)
    seconds = [median(one["seconds"] for one in rounds) for rounds in (ours, theirs)]
    if workload.kind == "headline":
        tokens = workload.batch * workload.new_tokens
        for name, rounds, total in zip(("ours", "theirs"), (ours, theirs), seconds, strict=True):
            shared[f"tok_s_{name}"] = round(tokens / total, 1)
            shared[f"rounds_{name}"] = [rounded(one["seconds"]) for one in rounds]
            shared[f"curve_{name}"] = curve(rounds[0]["steps"])
    else:
        shared["rounds"] = workload.rounds
    return row(workload.case, PEER, workload.unit, *seconds, **shared)


def _waited(rounds: Rounds) -> float | None:
    """None where engines do not see it.

    That is in a profile, and in an engine of one process without asynchronous scheduling.
    """
    waited = sum(float(one.get("waited", 0.0)) for one in rounds)
    if not waited or "seconds" not in rounds[0]:
        return None
    return round(waited / sum(float(np.sum(one["seconds"])) for one in rounds), 3)


def curve(steps: Sequence[float]) -> list[list[float]]:
    """Step times over the context, from the seconds of all steps of whole sequences.

    At most 64 of [tokens in the cache, median ms of up to 64 steps around], ascending.
    """
    # The first steps hold the prefill, and with asynchronous scheduling a call without a result.
    decode = [*enumerate(steps)][2:]
    stride = max(1, len(decode) // _CURVE_POINTS)
    width = min(_WINDOW, stride)
    windows = [decode[at : at + width] for at in range(0, len(decode) - width + 1, stride)]
    return [
        [HEADLINE_PROMPT + window[len(window) // 2][0], rounded(median(s for _, s in window) * 1e3)]
        for window in windows[-_CURVE_POINTS:]
    ]


def e2e_table(result: dict[str, Any]) -> Table:
    """Show a result, one line per row and one per workload that was skipped."""
    gpus = result["machine"]["gpus"]
    title = f"e2e: {result['model']}, {gpus[0] if gpus else result['machine']['cpu']}"
    shown = Table(title=title, title_justify="left")
    for name in ("case", "unit", "stock vLLM", "DELTA", "ratio", "notes"):
        shown.add_column(name, justify="left" if name in ("case", "unit", "notes") else "right")
    for line in result["rows"]:
        values = f"{line['theirs']:.4g}", f"{line['ours']:.4g}", f"{line['ratio']:.3f}×"
        shown.add_row(line["case"], line["unit"], *values, _notes(line))
    for line in result["skipped"]:
        shown.add_row(line["case"], "", "", "", "", f"skipped: {line['why']}")
    return shown


def _notes(line: dict[str, Any]) -> str:
    notes = []
    if line["kind"] == "headline":
        notes.append(f"{line['tok_s_theirs']:,.0f} and {line['tok_s_ours']:,.0f} tok/s")
    if line["kind"] == "profile":
        theirs, ours = (line[side]["graph_launches"] for side in ("profile_theirs", "profile_ours"))
        notes.append(f"graph launches a step: {theirs:g} and {ours:g}")
    if "tokens_a_step_ours" in line:
        given = (fmean(line[f"tokens_a_step_{side}"]) for side in ("theirs", "ours"))
        notes.append("tokens a step: {:.3g} and {:.3g}".format(*given))
    if line["within_budget"]:
        notes.append("within the budget")
    if line["preemptions"]:
        notes.append(f"{line['preemptions']} preemptions")
    return ", ".join(notes)


def _step_row(
    workload: Workload, ours: Rounds, theirs: Rounds, shared: dict[str, Any]
) -> dict[str, Any]:
    values = {}
    for name, rounds in (("ours", ours), ("theirs", theirs)):
        steps = [seconds * 1e3 for one in rounds for seconds in one["seconds"]]
        tokens = [one.get("tokens", 1.0) for one in rounds]
        if workload.drafts:
            shared[f"tokens_a_step_{name}"] = [round(given, 3) for given in tokens]
        if workload.lossless:
            # Steps give unlike numbers of tokens, and take as unlike times: only all of them
            # together say what a token takes.
            each = [
                1e3 * fmean(one["seconds"]) / given
                for one, given in zip(rounds, tokens, strict=True)
            ]
            values[name] = median(each)
            shared[f"steps_{name}"] = [float(f"{taken:.3g}") for taken in steps]
        else:
            each = [median(one["seconds"]) * 1e3 for one in rounds]
            values[name] = median(steps)
            tenths = quantiles(steps, n=10) if len(steps) > 1 else steps * 9
            shared[f"p10_{name}"], shared[f"p90_{name}"] = rounded(tenths[0]), rounded(tenths[-1])
        shared[f"rounds_{name}"] = [rounded(taken) for taken in each]
    # What was in the cache, where sequences that were read first ran ahead.
    shared["from"] = min(one["from"] for one in (*ours, *theirs))
    shared["to"] = max(one["to"] for one in (*ours, *theirs))
    shared["steps"] = workload.steps * workload.rounds
    return row(workload.case, PEER, workload.unit, values["ours"], values["theirs"], **shared)
