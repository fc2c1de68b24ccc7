"""DELTA (arXiv 2510.09883), as the package itself decodes with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from deltadecode.architecture import num_layers, text_config
from deltadecode.config import DeltaConfig, LayerPlan
from deltadecode.engines.transformers.swap import enabled
from deltadecode.lab.policies.base import Counts, Floats, Layout, Policy, pages_of


class Delta(Policy):
    """DELTA: :func:`deltadecode.enable`, no second implementation.

    Δ- and dense layers read everything, sparse layers K(N) pages. A last page that is partly filled
    counts as it is if recent pages are selected, and as full if L = 0. The budget is K · P tokens
    and replaces that of ``cfg``.
    """

    name = "delta"

    def __init__(self, layout: Layout, budget: int, cfg: DeltaConfig, plan: LayerPlan) -> None:
        super().__init__(layout, budget)
        least = cfg.recent_pages + cfg.sink_pages + 1
        pages = pages_of(self, budget, cfg.page_size, least)
        self.cfg, self.plan = replace(cfg, budget_pages=pages), plan

    @classmethod
    def make(cls, model: Any, layout: Layout, budget: int, **fields: Any) -> Delta:
        """The model's own plan, with some fields of it replaced; see :class:`DeltaConfig`.

        Its share is left out unless it is named: the budget is what policies are compared at.
        """
        base = replace(DeltaConfig.for_model(model), budget_share=0.0)
        # The budget is checked by the constructor, whose message names it in tokens.
        room = fields.get("recent_pages", base.recent_pages)
        room += fields.get("sink_pages", base.sink_pages)
        cfg = replace(base, **{"budget_pages": room + 1, **fields})
        layers = num_layers(text_config(model))
        return cls(layout, budget, cfg, cfg.layer_plan(layers, layout.layers))

    @contextmanager
    def decoding(self, model: Any) -> Iterator[None]:
        """While it lasts, ``model.generate`` decodes with DELTA."""
        with enabled(model, self.cfg):
            yield

    def counts(self, prompts: Sequence[int], steps: int) -> Counts:
        """What :func:`deltadecode.stats` counts, row by row; see :meth:`Policy.counts`."""
        lengths = np.asarray(prompts)[None] + np.arange(1.0, steps + 1)[:, None]
        return Counts(self.expected(lengths, 0), lengths, np.zeros_like(lengths))

    def pages_for(self, lengths: Floats) -> Floats:
        """Most pages that a sparse layer reads of rows of so many tokens, K(N)."""
        held = np.ceil(lengths / self.cfg.page_size).astype(np.int64)
        pages: Floats = np.vectorize(self.cfg.pages_for, otypes=[float])(held)
        return pages

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """Full layers read n, sparse layers their pages; see :meth:`Policy.expected`."""
        del prompt
        page, pages = self.cfg.page_size, self.pages_for(lengths)
        held = np.ceil(lengths / page)
        missing = held * page - lengths if self.cfg.recent_pages else 0.0
        sparse = np.where(held <= pages, lengths, pages * page - missing)
        sources = [self.plan.source(layer) for layer in self.layout.layers]
        share = sum(source is not None for source in sources) / len(sources)
        mean: Floats = share * sparse + (1 - share) * lengths
        return mean
