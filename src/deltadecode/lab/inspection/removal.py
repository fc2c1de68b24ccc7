"""What sink pages are worth: perplexity with them forced in, left to selection, and masked out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from deltadecode.config import DeltaConfig, LayerPlan
from deltadecode.lab.generation import teacher_forced_batch, unchecked
from deltadecode.lab.policies.base import Floats, Layout, Policy, View
from deltadecode.lab.policies.delta import Delta
from deltadecode.lab.policies.delta_variants import DeltaVariant
from deltadecode.lab.policies.full import Full
from deltadecode.lab.policies.masked import LayerAttention, MaskedPolicy
from deltadecode.lab.policies.pages import choose_pages, page_numbers, page_sums


@dataclass(frozen=True)
class Removal:
    """One way to treat the sink pages, judged by the tokens that full attention wrote.

    The first token is left out: it comes from the prompt.
    """

    name: str
    perplexity: float  # exp of the mean negative log-probability
    agreement: float  # share of tokens that it would have written too


class DeltaWithout(DeltaVariant):
    """DELTA whose sparse layers never read the ``hidden`` pages; Δ-layers choose others instead."""

    name = "delta-without"

    def __init__(
        self, layout: Layout, budget: int, cfg: DeltaConfig, plan: LayerPlan, hidden: range
    ) -> None:
        super().__init__(layout, budget, cfg, plan)
        self.hidden = hidden

    def _choose(self, attention: LayerAttention, view: View) -> Tensor:
        cfg = self.cfg
        scores = page_sums(attention.weights.flatten(1, 2).amax(dim=1), view, cfg.page_size)
        # Behind all others, which score 0 or more, but before pages that do not exist.
        scores[:, self.hidden.start : self.hidden.stop] = -1.0
        chosen = choose_pages(scores, view, cfg.page_size, cfg.budget_pages, cfg.recent_pages)
        # All pages of a text within the budget are chosen, whatever they score.
        newest = (view.lengths - 1) // cfg.page_size
        for page in self.hidden:
            if page < chosen.shape[1]:
                chosen[:, page] &= newest == page
        return chosen


class FullWithout(MaskedPolicy):
    """Full attention whose decode steps read the ``hidden`` pages in no layer."""

    name = "full-without"

    def __init__(self, layout: Layout, page_size: int, hidden: range) -> None:
        super().__init__(layout, 1)
        self.page_size, self.hidden = page_size, hidden

    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor:
        """Everything but the hidden pages; the page of the new token is read all the same."""
        page = page_numbers(view, self.page_size)
        hidden = (page >= self.hidden.start) & (page < self.hidden.stop) & (page != page[:, -1:])
        return ~hidden[:, None, None]

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """An upper bound; see :meth:`Policy.expected`."""
        del prompt
        return lengths


def treatments(
    layout: Layout, cfg: DeltaConfig, plan: LayerPlan, prompt: int
) -> list[tuple[str, Policy]]:
    """All treatments of the first max(S, 1) pages, with what each is compared with, by name.

    Without room for a sink page, K = L + 1, none is forced in. The control's pages lie in the
    middle of the prompt.
    """
    count = max(cfg.sink_pages, 1)
    budget = cfg.page_size * cfg.budget_pages
    first = range(count)
    middle = max(prompt // cfg.page_size // 2, count)
    control = range(middle, middle + count)
    free = replace(cfg, sink_pages=0)
    room = cfg.budget_pages > cfg.recent_pages + count
    forced = [replace(cfg, sink_pages=count)] if room else []
    return [
        ("full attention", Full(layout, 1)),
        *(
            ("DELTA, sink pages forced in", Delta(layout, budget, variant, plan))
            for variant in forced
        ),
        ("DELTA, sink pages left to selection", Delta(layout, budget, free, plan)),
        ("DELTA, sink pages masked out", DeltaWithout(layout, budget, free, plan, first)),
        ("full attention, sink pages masked out", FullWithout(layout, cfg.page_size, first)),
        (
            "full attention, middle pages masked out (control)",
            FullWithout(layout, cfg.page_size, control),
        ),
    ]


def remove(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    continuation: Tensor,
    policies: Sequence[tuple[str, Policy]],
    on_step: Callable[[int], None] = lambda steps: None,
) -> Iterator[Removal]:
    """Lead each treatment along ``continuation`` [1, steps ≥ 2], what full attention wrote."""
    encoded = unchecked(prompt, continuation.shape[1])
    for place, (name, policy) in enumerate(policies):
        before = place * continuation.shape[1]
        (record,) = teacher_forced_batch(
            model, tokenizer, policy, [encoded], continuation,
            lambda steps, before=before: on_step(before + steps),  # type: ignore[misc]
        )  # fmt: skip
        yield Removal(name, math.exp(record["nll"]), record["score"])
