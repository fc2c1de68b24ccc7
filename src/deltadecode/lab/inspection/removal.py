"""What sinks are worth: losses with their pages forced in, left to selection and masked out.

And what may be done with them without training (survey: Su et al., arXiv 2604.10098, section 3):
page scores that leave the sink's mass out, and a factor on the attention to the first token
(ZeroTuning, arXiv 2505.11739). All are losses of the text itself, beside full attention's, with
many decode steps in one pass (:mod:`deltadecode.lab.rows`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from deltadecode.config import DeltaConfig, LayerPlan
from deltadecode.lab.policies.base import Floats, Layout, Policy, View
from deltadecode.lab.policies.delta import Delta
from deltadecode.lab.policies.delta_variants import DeltaVariant
from deltadecode.lab.policies.full import Full
from deltadecode.lab.policies.masked import LayerAttention, MaskedPolicy
from deltadecode.lab.policies.pages import choose_pages, page_numbers, page_sums
from deltadecode.lab.rows import RowsText

SINK_PAGES = (0, 1, 2, 4)
FACTORS = (0.5, 0.8, 1.25, 2.0)
NAMES = {"full": "full attention", "delta": "DELTA"}


@dataclass(frozen=True)
class Treatment:
    """One way to decode the text; ``tags`` say in the report what was varied."""

    group: str  # "removal", "sink_pages" or "factors"
    name: str
    policy: Policy
    tags: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """How a treatment fares on the text's own next tokens; means over the decode steps."""

    treatment: Treatment
    nll: float  # negative log-probability, nats a token
    error: float  # standard error of its difference to full attention's, paired by step
    kl: float  # of full attention's distribution to its own, nats a token
    agreement: float  # share of steps whose likeliest token is full attention's

    @property
    def perplexity(self) -> float:
        """Of the text: the exponential of the loss."""
        return math.exp(self.nll)


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
        return chosen[:, None]


class DeltaSinkless(DeltaVariant):
    """DELTA whose page scores leave the first token out.

    Each head's weights on the other tokens are scaled to 1 before the maximum over heads is taken
    (R2): a head that spends nearly all of its attention on the sink then counts as much as any.
    """

    name = "delta-sinkless"

    def _choose(self, attention: LayerAttention, view: View) -> Tensor:
        cfg = self.cfg
        weights = attention.weights.masked_fill((view.position == 0)[:, None, None], 0.0)
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-30)
        scores = page_sums(weights.amax(dim=(1, 2)), view, cfg.page_size)
        chosen = choose_pages(
            scores, view, cfg.page_size, cfg.budget_pages, cfg.recent_pages, cfg.sink_pages
        )
        return chosen[:, None]


class FullWithout(MaskedPolicy):
    """Full attention whose decode steps read the ``hidden`` pages in no layer."""

    name = "full-without"

    def __init__(self, layout: Layout, page_size: int, hidden: range) -> None:
        super().__init__(layout, 1)
        self.page_size, self.hidden = page_size, hidden

    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor:
        """Everything but the hidden pages; the page of the new token is read all the same."""
        page = page_numbers(view, self.page_size)
        newest = (view.lengths[:, None] - 1) // self.page_size
        hidden = (page >= self.hidden.start) & (page < self.hidden.stop) & (page != newest)
        return ~hidden[:, None, None]

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """An upper bound; see :meth:`Policy.expected`."""
        del prompt
        return lengths


class Factor:
    """A factor g on the attention to the first token, before it is scaled to 1 again.

    α'_0 = g α_0 ÷ D and α'_t = α_t ÷ D with D = (g - 1) α_0 + 1 (ZeroTuning, arXiv 2505.11739): log
    g is added to the first token's logit. ``heads`` [layers, Hq] bool says in which heads.
    """

    def __init__(self, factor: float, heads: Tensor) -> None:
        self.log, self.heads = math.log(factor), heads

    def bias(self, layer: int, attention: LayerAttention, view: View) -> Tensor:
        """What the logits of a layer get, [B, Hkv, G, slots]."""
        heads = self.heads[layer].view(1, attention.key.shape[1], -1, 1).to(view.start.device)
        return ((view.position == 0)[:, None, None] & heads) * self.log


class FullScaled(FullWithout):
    """Full attention with a :class:`Factor`."""

    name = "full-scaled"

    def __init__(self, layout: Layout, factor: Factor) -> None:
        super().__init__(layout, 1, range(0))
        self.factor = factor

    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor:
        """Everything, by the changed logits."""
        attention.bias = self.factor.bias(layer, attention, view)
        return super().select(layer, attention, view)


class DeltaScaled(DeltaVariant):
    """DELTA with a :class:`Factor`, in every layer and in the page scores."""

    name = "delta-scaled"

    def __init__(
        self, layout: Layout, budget: int, cfg: DeltaConfig, plan: LayerPlan, factor: Factor
    ) -> None:
        super().__init__(layout, budget, cfg, plan)
        self.factor = factor

    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor | None:
        """What DELTA selects by the changed logits."""
        attention.bias = self.factor.bias(layer, attention, view)
        return super().select(layer, attention, view)


def treatments(
    layout: Layout, cfg: DeltaConfig, plan: LayerPlan, context: int, sink_heads: Tensor
) -> list[Treatment]:
    """All treatments, the first being full attention itself.

    The sink pages are the first max(S, 1); the control's lie in the middle of the ``context``
    tokens. ``sink_heads`` [layers, Hq] bool are those with a sink in the first token. Without room
    for S pages, K = L + S, there is no treatment with as many.
    """
    count = max(cfg.sink_pages, 1)
    budget = cfg.page_size * cfg.budget_pages
    first = range(count)
    middle = max(context // cfg.page_size // 2, count)
    control = range(middle, middle + count)
    free = replace(cfg, sink_pages=0)
    room = [
        pages
        for pages in sorted({*SINK_PAGES, cfg.sink_pages})
        if cfg.budget_pages > cfg.recent_pages + pages
    ]
    best = replace(cfg, sink_pages=count if count in room else 0)
    full = Treatment("removal", NAMES["full"], Full(layout, 1))
    found = [
        full,
        Treatment(
            "removal",
            "DELTA, sink pages masked out",
            DeltaWithout(layout, budget, free, plan, first),
        ),
        Treatment(
            "removal",
            "full attention, sink pages masked out",
            FullWithout(layout, cfg.page_size, first),
        ),
        Treatment(
            "removal",
            "full attention, middle pages masked out (control)",
            FullWithout(layout, cfg.page_size, control),
        ),
        Treatment(
            "removal",
            "DELTA, page scores without the sink",
            DeltaSinkless(layout, budget, best, plan),
        ),
    ]
    for pages in room:
        delta = Delta(layout, budget, replace(cfg, sink_pages=pages), plan)
        found.append(Treatment("sink_pages", f"DELTA, S = {pages}", delta, {"sink_pages": pages}))
    everywhere = torch.ones_like(sink_heads)
    kinds = {"all": everywhere, "with a sink": sink_heads, "without": ~sink_heads}
    for heads, where in kinds.items():
        for value in FACTORS if bool(where.any()) else ():
            factor = Factor(value, where)
            policies: list[tuple[str, Policy]] = [("full", FullScaled(layout, factor))]
            if heads == "all":
                policies.append(("delta", DeltaScaled(layout, budget, best, plan, factor)))
            for under, policy in policies:
                tags = {"factor": value, "heads": heads, "under": NAMES[under]}
                found.append(
                    Treatment("factors", f"{NAMES[under]}, {heads}, × {value}", policy, tags)
                )
    return found


def losses(
    model: Any,
    ids: Sequence[int],
    context: int,
    tried: Sequence[Treatment],
    on_treatment: Callable[[int], None] = lambda done: None,
) -> Iterator[Loss]:
    """Loss of each treatment on the tokens of a text, ``ids``, behind the first ``context`` + 1."""
    text = RowsText.prepare(model, torch.tensor(ids, device=model.device), context)
    for place, treatment in enumerate(tried):
        on_treatment(place)
        found = text.compare(text.log_probs(model, treatment.policy))
        apart = (found.nll - found.nll_full).double()
        yield Loss(
            treatment,
            float(found.nll.double().mean()),
            float(apart.std(correction=0)) / math.sqrt(len(apart)),
            float(found.kl.double().mean()),
            float(found.same.double().mean()),
        )
