"""One inspection: a pass over a text, and its losses with the sinks treated in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from deltadecode.architecture import num_layers, text_config
from deltadecode.config import DeltaConfig, LayerPlan
from deltadecode.errors import InspectionError
from deltadecode.lab.generation import new_tokens, unchecked
from deltadecode.lab.inspection.measure import Measure, Rows, measure
from deltadecode.lab.inspection.pages import PageMap
from deltadecode.lab.inspection.removal import Loss, losses, treatments
from deltadecode.lab.inspection.sinks import EPSILON
from deltadecode.lab.policies.base import Layout
from deltadecode.lab.policies.full import Full
from deltadecode.lab.rows import refusal

NEW_TOKENS = 512
LOSS_TOKENS = 256
OBSERVED = 96  # steps: enough for a page map, and few enough to embed it in a page
_LEAST_PAGES = 8
_MEASURE = 0.3  # about the pass's share of the work
# Called with what goes on and the share of all work that is done.
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Inspection:
    """Everything that was measured of one text."""

    config: DeltaConfig  # as it was inspected with, see fit_config
    plan: LayerPlan
    layout: Layout
    stride: int  # every so manieth decode step was observed
    context: int  # tokens before the first decode step
    ids: list[int]  # the whole text; its last token is never in the cache
    pages: PageMap
    measured: Measure  # the whole text in one pass
    loss_steps: int  # decode steps that the losses are means over
    losses: list[Loss]  # empty if they were not asked for, or cannot be had
    refused: str | None  # why they cannot


def fit_config(config: DeltaConfig, prompt: int, steps: int) -> DeltaConfig:
    """A budget that leaves something to select in a text that is short for the plan's own.

    The plan's own, if the text has more pages than K before half of its new tokens are written;
    else K is a quarter of its pages then, and L and S no more than fit. Raises InspectionError when
    the text has less than 8 pages.
    """
    pages = -(-(prompt + steps // 2) // config.page_size)
    if pages > config.budget_pages:
        return config
    if pages < _LEAST_PAGES:
        raise InspectionError(
            f"a text to inspect needs {_LEAST_PAGES} pages of {config.page_size} tokens by half of "
            f"its new tokens, got {prompt} tokens of prompt and {steps} new ones; give a longer "
            "prompt, more new tokens or smaller pages"
        )
    budget = pages // 4
    recent = min(config.recent_pages, budget // 2)
    sinks = min(config.sink_pages, budget - recent - 1)
    return replace(config, budget_pages=budget, recent_pages=recent, sink_pages=sinks)


def stride_for(steps: int, page_size: int) -> int:
    """Steps from one observed step to the next, so that about 96 are observed.

    The stride shares no divisor with the page size, or all observed steps would stand at the same
    places of their pages.
    """
    stride = -(-steps // OBSERVED)
    while math.gcd(stride, page_size) > 1:
        stride += 1
    return stride


def continue_prompt(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    steps: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> list[int]:
    """A prompt and what full attention writes behind it, greedily, at most ``steps`` tokens.

    Raises InspectionError when the model ends the text at once.
    """
    full = Full(Layout.of(model), 1)
    written = new_tokens(model, tokenizer, full, [unchecked(prompt, steps)], steps, on_step)
    if written.shape[1] < 2:
        raise InspectionError(
            "there is no decode step to look at: the model ended its text with the first token; "
            "give another prompt"
        )
    return [*prompt, *written[0].tolist()]


def inspect_text(
    model: Any,
    ids: Sequence[int],
    context: int,
    config: DeltaConfig,
    *,
    loss_steps: int = LOSS_TOKENS,
    epsilon: float = EPSILON,
    progress: Progress = lambda what, done: None,
) -> Inspection:
    """Measure a text whose tokens behind the first ``context`` ones are decode steps.

    The budget must be below the pages of the text, see :func:`fit_config`. Each treatment of the
    sinks is judged by the first ``loss_steps`` decode steps; with 0 none is tried, nor with a model
    that :func:`deltadecode.lab.rows.refusal` refuses. ``epsilon`` says which heads have a sink.
    Memory beside the model: what :mod:`deltadecode.lab.inspection.measure` and
    :mod:`deltadecode.lab.rows` say. Raises InspectionError when the text never has more pages than
    the budget.
    """
    layout = Layout.of(model)
    plan = config.layer_plan(num_layers(text_config(model)), layout.layers)
    steps = len(ids) - context - 1
    if -(-(len(ids) - 1) // config.page_size) <= config.budget_pages:
        raise InspectionError(
            f"the budget must be below the pages of the text's {len(ids) - 1} tokens in the cache, "
            f"got {config.budget_pages} pages of {config.page_size}"
        )
    stride = stride_for(steps, config.page_size)
    observed = torch.arange(0, steps, stride)
    lengths = context + 1 + observed
    measured = measure(
        model,
        torch.tensor([list(ids)]),
        lambda layers: progress("attention", _MEASURE * layers / plan.num_layers),
        rows=Rows(lengths, config.page_size),
    )
    judged: list[Loss] = []
    refused = refusal(model) if loss_steps else None
    steps = 0 if refused else min(loss_steps, steps)
    if steps:
        first = torch.stack([layer.mean[:, 0] > epsilon for layer in measured.attention])
        tried = treatments(layout, config, plan, context, first)
        judged = list(
            losses(
                model, ids[: context + steps + 1], context, tried,
                lambda done: progress(
                    "losses with the sinks treated", _MEASURE + (1 - _MEASURE) * done / len(tried)
                ),
            )
        )  # fmt: skip
    rows = [layer.rows for layer in measured.attention if layer.rows is not None]
    return Inspection(
        config=config,
        plan=plan,
        layout=layout,
        stride=stride,
        context=context,
        ids=list(ids),
        pages=PageMap.of(config, observed, lengths, rows),
        measured=measured,
        loss_steps=steps,
        losses=judged,
        refused=refused,
    )
