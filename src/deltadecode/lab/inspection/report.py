"""The numbers of an inspection as JSON has them, and the rows of a result file."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from deltadecode.lab.inspection.run import Inspection
from deltadecode.lab.inspection.sinks import EPSILON, LEAST_QUERIES, describe
from deltadecode.lab.results import row

_DIGITS = 5


def make_report(
    inspection: Inspection,
    show_token: Callable[[int], str],
    made_by: dict[str, Any],
    epsilon: float = EPSILON,
    least_queries: int = LEAST_QUERIES,
) -> dict[str, Any]:
    """Everything but the page map; ``made_by`` (command, commit, versions, text ...) goes first.

    ``tokens`` (prompt: those before the decode steps; new, observed steps and their stride),
    ``plan`` (the configuration, and the role and source of each full-attention layer), ``layers``
    (numbers of the full-attention layers, by which all lists and matrices go), ``shift``,
    ``overlap``, ``captured``, ``drift`` (``lags`` in decode steps; per layer of the model, the
    ``overlap`` of choices so far apart and the attention ``held`` by a choice so old; the overlap
    of two choices by ``chance``), ``recall`` (per sparse layer: the mass that lies on the pages of
    its source Δ-layer, the most that any K pages chosen by its own scores hold, and their ratio),
    ``entropy_bits`` [layers][heads], ``token_texts`` by position, ``sinks``
    (:func:`deltadecode.lab.inspection.sinks.describe`), ``first_page`` (:func:`first_page`) and
    ``losses`` (``steps``, ``pages`` that are treated, why it was ``refused``, and by group what
    each treatment of the sinks costs).
    """
    layers = list(inspection.layout.layers)
    rows = [each.rows for each in inspection.measured.attention if each.rows is not None]
    captured = inspection.pages.captured()
    texts = [show_token(token) for token in inspection.ids]
    sinks = describe(
        inspection.measured, texts, inspection.config.page_size, epsilon, least_queries
    )
    return {
        **made_by,
        "tokens": {
            "prompt": inspection.context,
            "new": len(inspection.ids) - inspection.context,
            "observed_steps": len(inspection.pages.steps),
            "over_budget_steps": int(inspection.pages.over_budget.sum()),
            "stride": inspection.stride,
        },
        "plan": {
            **inspection.config.to_dict(),
            "roles": [inspection.plan.role(layer) for layer in layers],
            "sources": [inspection.plan.source(layer) for layer in layers],
        },
        "layers": layers,
        "shift": [_list(each.shift) for each in rows],
        "overlap": _list(inspection.pages.overlap()),
        "captured": _list(captured),
        "drift": _drift(inspection, layers),
        "recall": _recall(inspection, layers, captured),
        "entropy_bits": [_list(each.entropy.numpy()) for each in rows],
        "token_texts": {
            str(top): texts[top] for entry in sinks["layers"] for top in entry["top_token"]
        },
        "sinks": sinks,
        "first_page": first_page(inspection, layers),
        "losses": _losses(inspection),
    }


def first_page(inspection: Inspection, layers: list[int]) -> list[dict[str, Any]]:
    """What each full-attention layer does with the first page, over the steps over the budget.

    ``mass``, its share of the layer's attention; ``missed``, the share of steps in which the
    layer's own scores would not select it if it were not forced in. Of a sparse layer also those of
    its source: ``source_missed``, and ``missed_mass``, its own mean mass on the page at those
    steps, None without any.
    """
    pages = inspection.pages
    over = pages.over_budget
    mass = pages.mass[over][:, :, 0] / pages.mass[over].sum(axis=2)
    missed = ~pages.finds_first[over]
    rows = []
    for place, layer in enumerate(layers):
        entry: dict[str, Any] = {
            "layer": layer,
            "mass": round(float(mass[:, place].mean()), _DIGITS),
            "missed": round(float(missed[:, place].mean()), _DIGITS),
        }
        source = inspection.plan.source(layer)
        if source is not None:
            at = missed[:, layers.index(source)]
            entry["source_missed"] = round(float(at.mean()), _DIGITS)
            lost = round(float(mass[at, place].mean()), _DIGITS) if at.any() else None
            entry["missed_mass"] = lost
        rows.append(entry)
    return rows


def _losses(inspection: Inspection) -> dict[str, Any]:
    groups: dict[str, list[dict[str, Any]]] = {"removal": [], "sink_pages": [], "factors": []}
    for each in inspection.losses:
        groups[each.treatment.group].append(
            {
                "name": each.treatment.name,
                **each.treatment.tags,
                "loss": round(each.nll, _DIGITS),
                "error": round(each.error, _DIGITS),
                "perplexity": round(each.perplexity, _DIGITS),
                "kl": round(each.kl, 6),
                "agreement": round(each.agreement, _DIGITS),
            }
        )
    return {
        "pages": max(inspection.config.sink_pages, 1),
        "steps": inspection.loss_steps,
        "refused": inspection.refused,
        **groups,
    }


def result_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a result file: each treatment of the sinks, and the recall; less is better."""
    rows, losses = [], report["losses"]
    for entry in [each for group in ("removal", "sink_pages", "factors") for each in losses[group]][
        1:
    ]:
        rows.append(
            row(entry["name"], losses["removal"][0]["name"], "perplexity of the text",
                entry["perplexity"], losses["removal"][0]["perplexity"], kl=entry["kl"],
                agreement=entry["agreement"])
        )  # fmt: skip
    for entry in report["recall"]:
        rows.append(
            row(f"layer {entry['layer']}, pages of Δ-layer {entry['source']}", "its own pages",
                "share of attention missed", max(1 - entry["captured"], 1e-6),
                max(1 - entry["best"], 1e-6))
        )  # fmt: skip
    return rows


def summary_lines(report: dict[str, Any]) -> list[str]:
    """What a person reads first, a line each."""
    sinks, tokens = report["sinks"], report["tokens"]
    lines = [
        f"{tokens['prompt']} tokens of prompt, {tokens['new']} new; {tokens['observed_steps']} "
        f"decode steps looked at",
        f"sink rate {sinks['rate']:.1%} of {sinks['heads']} heads (mean attention > "
        f"{sinks['epsilon']:g}); first token {sinks['first_token_rate']:.1%}",
    ]
    if sinks["sinks"]:
        top = sinks["sinks"][0]
        lines.append(
            f"strongest sink: token {top['position']} ({top['token']!r}), {top['heads']} heads, "
            f"value norm {top['value_ratio']:.2f}× and hidden state {top['hidden_ratio']:.1f}× the "
            "median"
        )
    if report["recall"]:
        worst = min(report["recall"], key=lambda entry: entry["recall"])
        mean = float(np.mean([entry["recall"] for entry in report["recall"]]))
        lines.append(
            f"recall of the plan's pages {mean:.1%} on average, least in layer {worst['layer']} "
            f"({worst['recall']:.1%})"
        )
    deltas = [
        entry for entry in report["first_page"] if entry["layer"] in report["plan"]["delta_layers"]
    ]
    lines += [
        f"Δ-layer {entry['layer']} misses the first page in {entry['missed']:.1%} of the steps"
        for entry in deltas
    ]
    losses = report["losses"]
    lines += [
        f"perplexity {entry['perplexity']:.4f}, KL {entry['kl']:.4f}: {entry['name']}"
        for entry in losses["removal"] + losses["sink_pages"]
    ]
    if losses["factors"]:
        best = min(losses["factors"], key=lambda entry: entry["loss"])
        lines.append(
            f"best factor on the sink: perplexity {best['perplexity']:.4f}, {best['name']}"
        )
    return lines


def _drift(inspection: Inspection, layers: list[int]) -> dict[str, Any]:
    places = list(enumerate(layers))
    return {
        "lags": inspection.pages.lags().tolist(),
        "chance": _list(inspection.pages.chance()),
        "overlap": {str(layer): _list(inspection.pages.drift(place)) for place, layer in places},
        "held": {str(layer): _list(inspection.pages.held(place)) for place, layer in places},
    }


def _recall(inspection: Inspection, layers: list[int], captured: Any) -> list[dict[str, Any]]:
    rows = []
    for place, layer in enumerate(layers):
        source = inspection.plan.source(layer)
        if source is None:
            continue
        share = float(captured[layers.index(source), place])
        best = float(captured[place, place])
        rows.append(
            {
                "layer": layer,
                "source": source,
                "captured": round(share, _DIGITS),
                "best": round(best, _DIGITS),
                "recall": round(share / best, _DIGITS) if best else 0.0,
            }
        )
    return rows


def _list(values: Any) -> Any:
    """Lists of rounded numbers; None for NaN, which JSON does not have."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, list):
        return [_list(value) for value in values]
    return None if math.isnan(values) else round(values, _DIGITS)
