"""One inspection: a watched generation, a pass over its text, and the sinks taken away."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from deltadecode.architecture import num_layers, text_config
from deltadecode.config import DeltaConfig, LayerPlan
from deltadecode.errors import InspectionError
from deltadecode.lab.attention_statistics import Captured, PageBudget, Shift
from deltadecode.lab.generation import new_tokens, unchecked
from deltadecode.lab.inspection.measure import Measure, measure
from deltadecode.lab.inspection.pages import Entropy, PageMap, PageMaps
from deltadecode.lab.inspection.removal import Removal, remove, treatments
from deltadecode.lab.observe import Observed
from deltadecode.lab.policies.base import Layout

NEW_TOKENS = 512
REMOVAL_TOKENS = 192
OBSERVED = 96  # steps: enough for a page map, and few enough to embed it in a page
_LEAST_PAGES = 8
# Called with what goes on and the share of all work that is done.
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Inspection:
    """Everything that was measured of one text."""

    config: DeltaConfig  # as it was inspected with, see fit_config
    plan: LayerPlan
    layout: Layout
    stride: int  # every so manieth decode step was observed
    prompt: int  # tokens of the prompt
    ids: list[int]  # of the prompt and of what full attention wrote
    pages: PageMap
    captured: Any  # R [layers, layers]
    shift: Any  # [layers]
    entropy: Any  # [layers, Hq], bits
    measured: Measure  # the whole text in one pass
    removal: list[Removal]  # empty if it was not asked for


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


def inspect_text(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    config: DeltaConfig,
    *,
    steps: int = NEW_TOKENS,
    removal_steps: int = REMOVAL_TOKENS,
    progress: Progress = lambda what, done: None,
) -> Inspection:
    """Continue a prompt greedily with full attention, and measure.

    The budget must be below the pages of the text, see :func:`fit_config`. Each treatment of the
    sink pages is led along ``removal_steps`` tokens of the continuation; with less than 2 none is
    tried. Memory beside the model and its cache: the weights of one layer and step (4 · Hq · n
    bytes, a few copies); 5 bytes per observed step, full-attention layer and page; and what
    :mod:`deltadecode.lab.inspection.measure` says. Raises InspectionError when the model ends the
    text at once, CalibrationError when the text never has more pages than the budget.
    """
    layout = Layout.of(model)
    plan = config.layer_plan(num_layers(text_config(model)), layout.layers)
    depth = len(layout.layers)
    budget = PageBudget(config.budget_pages, config.recent_pages, config.sink_pages)
    captured, shift = Captured(1, depth, [budget], config.page_size), Shift(1, depth)
    maps, entropy = PageMaps(config), Entropy(depth, layout.query_heads)
    stride = stride_for(steps, config.page_size)
    watched = Observed(layout, [captured, shift, maps, entropy], config.page_size, stride)
    watched.begin_batch(torch.zeros(1, dtype=torch.int64, device=model.device))
    policies = treatments(layout, config, plan, len(prompt)) if removal_steps > 1 else []
    # In tokens; a step that is led along masks is about as dear as one that is watched.
    share = _Shares(progress, [steps, max(steps // 4, 1), removal_steps * len(policies)])

    on_step = share.part(0, "full attention, watched")
    written = new_tokens(model, tokenizer, watched, [unchecked(prompt, steps)], steps, on_step)
    ids = [*prompt, *written[0].tolist()]
    page_map = maps.finish()
    on_step = share.part(1, "attention sinks")
    measured = measure(
        model,
        torch.tensor([ids]),
        lambda layers: on_step(layers * steps // 4 // plan.num_layers),
    )
    continuation = written[:, :removal_steps]
    removal: list[Removal] = []
    if continuation.shape[1] > 1:
        on_step = share.part(2, "perplexity without sinks")
        removal = list(remove(model, tokenizer, prompt, continuation, policies, on_step))
    return Inspection(
        config=config,
        plan=plan,
        layout=layout,
        stride=stride,
        prompt=len(prompt),
        ids=ids,
        pages=page_map,
        captured=captured.matrix(budget),
        shift=shift.curve(),
        entropy=entropy.bits(),
        measured=measured,
        removal=removal,
    )


class _Shares:
    """Progress over parts of known work."""

    def __init__(self, progress: Progress, work: Sequence[int]) -> None:
        self._progress, self._work = progress, list(work)

    def part(self, number: int, name: str) -> Callable[[int], None]:
        """To be told of the work that is done of one part."""
        before, total = sum(self._work[:number]), max(sum(self._work), 1)
        return lambda done: self._progress(name, (before + done) / total)
