"""From the files of the cells to one row per cell: accuracy, intervals, reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from deltadecode.errors import EvaluationError
from deltadecode.lab.evaluation.records import Records, digest
from deltadecode.lab.evaluation.statistics import mean_interval, paired_difference
from deltadecode.lab.results import rounded, row

_APART = ("policy", "budget")  # what tells the cells of one experiment apart


def load(paths: Iterable[Path]) -> list[Records]:
    """Read files of cells, those in folders included.

    Raises EvaluationError when there is none, one cannot be read, or two are of the same cell.
    """
    files: list[Path] = []
    for path in paths:
        files += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise EvaluationError(f"no .jsonl file of an evaluation in {', '.join(map(str, paths))}")
    cells = [Records.read(file) for file in files]
    seen: dict[str, Path] = {}
    for records in cells:
        key = digest(records.settings)
        if key in seen:
            raise EvaluationError(
                f"{str(records.path)!r} is of the same cell as {str(seen[key])!r}"
            )
        seen[key] = records.path
    return cells


def summarize(cells: Sequence[Records]) -> list[dict[str, Any]]:
    """One row of a result file per cell, the experiments one after the other.

    An experiment is a model, task, seed and dtype. Raises EvaluationError when one has no run of
    ``full``, or a cell lacks samples.
    """
    experiments: dict[str, list[Records]] = {}
    for records in cells:
        shared = {key: value for key, value in records.settings.items() if key not in _APART}
        experiments.setdefault(digest(shared), []).append(records)
    rows: list[dict[str, Any]] = []
    for group in experiments.values():
        full = next((cell for cell in group if cell.settings["policy"] == "full"), None)
        if full is None:
            raise EvaluationError(
                f"the evaluation of {case(group[0])} has no run of policy 'full' to compare with"
            )
        everything = set().union(*(cell.samples for cell in group))
        for records in sorted(group, key=_order):
            missing = everything - set(records.samples)
            if missing or not everything:
                raise EvaluationError(
                    f"{str(records.path)!r} lacks {len(missing)} of {len(everything)} samples; run "
                    "it again to its end"
                )
            rows.append(_row(records, full, sorted(everything)))
    return rows


def _order(records: Records) -> tuple[bool, str, int]:
    settings = records.settings
    return settings["policy"] != "full", settings["policy"], settings["budget"]


def case(records: Records) -> str:
    """Name of the task with its options."""
    task = dict(records.settings["task"])
    name = task.pop("name")
    task.pop("digest", None)  # of a text, which its name tells well enough
    options = ":".join(f"{key}={value}" for key, value in task.items() if value != "")
    return f"{name}:{options}" if options else str(name)


def _column(records: Records, seeds: Sequence[int], name: str) -> NDArray[np.float64]:
    return np.array([records.samples[seed][name] for seed in seeds], dtype=np.float64)


def _row(records: Records, full: Records, seeds: Sequence[int]) -> dict[str, Any]:
    ours, theirs = (_column(cell, seeds, "score") for cell in (records, full))
    score, difference = mean_interval(ours), paired_difference(ours, theirs)
    read, everything = (_column(records, seeds, name).sum() for name in ("read", "full"))
    metadata = _column(records, seeds, "metadata").sum()
    wrong = [records.samples[seed].get("first_wrong") for seed in seeds]
    extras: dict[str, Any] = {
        "policy": records.settings["policy"],
        "budget": records.settings["budget"],
        "samples": len(seeds),
        "first_seed": seeds[0],
        "score": rounded(score.mean),
        "score_interval": [rounded(score.low), rounded(score.high)],
        "difference": rounded(difference.mean),
        "difference_interval": [rounded(difference.low), rounded(difference.high)],
        "attended_fraction": rounded(float(read / everything)) if everything else 1.0,
        "metadata_fraction": rounded(float(metadata / everything)) if everything else 0.0,
        "tokens_kept": round(float(_column(records, seeds, "kept").mean()), 1),
        "tokens_new": round(float(_column(records, seeds, "tokens").mean()), 1),
        "wrong_somewhere": sum(place is not None for place in wrong),
        "first_wrong": wrong,
        "asked_fraction": records.made_by.get("fraction"),
        "expected_fraction": records.made_by.get("expected"),
    }
    # A policy that goes wrong may stop early, where the prompt weighs more: its own trace then says
    # less of it than the trace of a right answer, for which its reads are known beforehand.
    own, expected = extras["attended_fraction"], extras["expected_fraction"]
    extras["reads"] = own if expected is None else min(own, rounded(expected))
    if "nll" in next(iter(records.samples.values())):
        extras |= _perplexity(records, full, seeds)
    label = f"{case(records)}, {records.settings['policy']}"
    label += f" {records.settings['budget']}" if records.settings["budget"] else ""
    if "kl" in next(iter(records.samples.values())):
        extras |= _divergence(records, seeds)
        losses = [math.exp(_column(cell, seeds, "nll").mean()) for cell in (records, full)]
        return row(label, "full attention", "perplexity", *losses, **extras)
    lost = [1 + float((1 - scores).sum()) for scores in (ours, theirs)]
    return row(label, "full attention", "score lost over all samples, plus one", *lost, **extras)


def _divergence(records: Records, seeds: Sequence[int]) -> dict[str, Any]:
    """KL(full || policy) of each sample is a paired difference already."""
    interval = mean_interval(_column(records, seeds, "kl"))
    at_once = {records.samples[seed].get("at_once") for seed in seeds}
    return {
        "kl": rounded(interval.mean),
        "kl_interval": [rounded(interval.low), rounded(interval.high)],
        "rows": "at once" if at_once == {True} else "step by step",
    }


def _perplexity(records: Records, full: Records, seeds: Sequence[int]) -> dict[str, Any]:
    ours, theirs = (_column(cell, seeds, "nll") for cell in (records, full))
    ratio = paired_difference(ours, theirs)
    return {
        "perplexity": rounded(math.exp(ours.mean())),
        "perplexity_ratio": rounded(math.exp(ratio.mean)),
        "perplexity_ratio_interval": [
            rounded(math.exp(ratio.low)),
            rounded(math.exp(ratio.high)),
        ],
    }


_COLUMNS = ("policy", "budget", "read", "+ other", "kept", "right", "95 %", "− full", "95 %")


def _cells_of(line: dict[str, Any]) -> list[str]:
    low, high = line["score_interval"]
    below, above = line["difference_interval"]
    texts = [
        line["policy"],
        f"{line['budget']:,}" if line["budget"] else "–",
        f"{100 * line['reads']:.1f} %",
        f"{100 * line['metadata_fraction']:.1f} %" if line["metadata_fraction"] else "–",
        f"{line['tokens_kept']:,.0f}",
        f"{100 * line['score']:.1f}",
        f"{100 * low:.1f} … {100 * high:.1f}",
        f"{100 * line['difference']:+.1f}",
        f"{100 * below:+.1f} … {100 * above:+.1f}",
    ]
    if "perplexity_ratio" in line:
        low, high = line["perplexity_ratio_interval"]
        texts += [f"{line['perplexity_ratio']:.4f}", f"{low:.4f} … {high:.4f}"]
    if "kl" in line:
        low, high = line["kl_interval"]
        texts += [f"{line['kl']:.4f}", f"{low:.4f} … {high:.4f}"]
    return texts


def by_task(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each task, in their order."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for line in rows:
        parts.setdefault(line["case"].rsplit(", ", 1)[0], []).append(line)
    return parts


def _titles(lines: Sequence[dict[str, Any]]) -> list[str]:
    titles = [*_COLUMNS]
    if "perplexity_ratio" in lines[0]:
        titles += ["perplexity ÷ full", "95 %"]
    if "kl" in lines[0]:
        titles[titles.index("right")] = "same token"
        titles += ["KL, nats a token", "95 %"]
    return titles


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """The rows as tables for a terminal, one per task; all numbers but the tokens in per cent."""
    shown = []
    for name, lines in by_task(rows).items():
        table = Table(
            title=f"{name}, {lines[0]['samples']} samples", title_justify="left", box=SIMPLE_HEAD
        )
        table.add_column("policy", overflow="fold", min_width=14)
        # The score of a text is against full attention already.
        of_text = "kl" in lines[0]
        titles = ["same [95 %]"] if of_text else ["right [95 %]", "− full [95 %]"]
        for title in ("budget", "read", "kept", *titles):
            table.add_column(title, justify="right", no_wrap="[" not in title)
        if "perplexity_ratio" in lines[0]:
            table.add_column("ppl ÷ full", justify="right", no_wrap=not of_text)
        if of_text:
            table.add_column("KL [95 %]", justify="right")
        for line in lines:
            table.add_row(*_short_cells(line))
        shown.append(table)
    return shown


def _short_cells(line: dict[str, Any]) -> list[str]:
    low, high = (100 * bound for bound in line["score_interval"])
    below, above = (100 * bound for bound in line["difference_interval"])
    other = line["metadata_fraction"]
    texts = [
        line["policy"],
        str(line["budget"] or "–"),
        f"{100 * line['reads']:.1f}" + (f"+{100 * other:.1f}" if other else ""),
        f"{line['tokens_kept']:.0f}",
        f"{100 * line['score']:.1f} [{low:.1f}, {high:.1f}]",
    ]
    if "kl" in line:
        low, high = line["perplexity_ratio_interval"]
        texts.append(f"{line['perplexity_ratio']:.4f} [{low:.3f}, {high:.3f}]")
        low, high = line["kl_interval"]
        return [*texts, f"{line['kl']:.4f} [{low:.4f}, {high:.4f}]"]
    texts.append(f"{100 * line['difference']:+.1f} [{below:+.1f}, {above:+.1f}]")
    if "perplexity_ratio" in line:
        texts.append(f"{line['perplexity_ratio']:.4f}")
    return texts


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown tables, one per task."""
    blocks = []
    for name, lines in by_task(rows).items():
        titles = _titles(lines)
        block = [f"`{name}`, {lines[0]['samples']} samples from seed {lines[0]['first_seed']}:", ""]
        block.append("| " + " | ".join(titles) + " |")
        block.append("|---" + "|--:" * (len(titles) - 1) + "|")
        block += ["| " + " | ".join(_cells_of(line)) + " |" for line in lines]
        blocks.append("\n".join(block))
    return "\n\n".join(blocks) + "\n"


def verdicts(rows: Sequence[dict[str, Any]], within: float = 0.01) -> list[str]:
    """Say for each cell of DELTA which peers are better with no more reads, and which worse.

    Two cells read the same if their ``reads`` differ by no more than ``within``; what a policy
    reads besides keys and values is not in that fraction, but named. Ahead or level are peers that
    read the same or less, behind are those that read the same or more; the oracle is no peer.
    """
    sentences = []
    for name, lines in by_task(rows).items():
        kinds = [(line["policy"].split(":")[0], line) for line in lines]
        peers = [x for kind, x in kinds if kind not in ("full", "oracle", "delta", "delta-variant")]
        if not peers:
            continue
        for delta in (x for kind, x in kinds if kind == "delta"):
            reads, score = delta["reads"], _merit(delta)
            no_more = [x for x in peers if x["reads"] <= reads + within]
            no_less = [x for x in peers if x["reads"] >= reads - within]
            ahead = [_named(x) for x in no_more if _merit(x) > score]
            level = [_named(x) for x in no_more if _merit(x) == score]
            behind = [_named(x) for x in no_less if _merit(x) < score]
            sentences.append(
                f"{name}: {_named(delta)}. "
                f"Better with no more reads: {', '.join(ahead) or 'none'}. "
                f"Level: {', '.join(level) or 'none'}. "
                f"Worse with no fewer reads: {', '.join(behind) or 'none'}."
            )
    return sentences


def _merit(line: dict[str, Any]) -> float:
    """What cells of a task are compared by; more is better."""
    return float(-line["kl"] if "kl" in line else line["score"])


def _named(line: dict[str, Any]) -> str:
    other = line["metadata_fraction"]
    besides = f" + {100 * other:.1f} %" if other else ""
    merit = f"KL {line['kl']:.4f}" if "kl" in line else f"{100 * line['score']:.1f}"
    return (
        f"{line['policy']} {line['budget']} ({merit}, reads {100 * line['reads']:.1f} %{besides})"
    )
