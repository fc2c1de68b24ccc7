"""A trained index as a policy of the laboratory: it takes the place of the Δ-layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from deltadecode.errors import PolicyError
from deltadecode.lab.policies import POLICIES
from deltadecode.lab.policies.base import Floats, Layout, View, pages_of
from deltadecode.lab.policies.layers import full_layers_mean
from deltadecode.lab.policies.masked import LayerAttention, MaskedPolicy
from deltadecode.lab.policies.pages import by_page, choose_pages, page_sums, page_tokens

from .model import Index, Watch, watching


class TrainedIndex(MaskedPolicy):
    """Layers before the first source read everything; all others read K pages.

    At a source the pages are chosen for its own layer and those up to the next source. A page's
    score is the sum over its tokens of the index's softmax (``pool=sum``; DELTA's S_u has the same
    sum), or its largest logit (``pool=max``). Recent and sink pages are always read. Index keys are
    counted as metadata.
    """

    name = "index"
    watches: ClassVar[Mapping[str, Watch]] = {}  # of the model that runs, by name

    def __init__(
        self, layout: Layout, budget: int, page_size: int = 16, which: str = "", recent: int = 8,
        sink: int = 1, pool: str = "sum",
    ) -> None:  # fmt: skip
        super().__init__(layout, budget)
        if which not in self.watches:
            raise PolicyError(f"there is no index {which!r}; there are {', '.join(self.watches)}")
        if pool not in ("sum", "max"):
            raise PolicyError(f"pool of policy 'index' must be sum or max, got {pool!r}")
        self.watch, self.pool = self.watches[which], pool
        self.page_size, self.recent, self.sink = page_size, recent, sink
        self.pages = pages_of(self, budget, page_size, recent + sink + 1)
        self.sources = self.watch.index.config.sources
        self._chosen: Tensor | None = None

    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor | None:
        """Choose at a source, else take what the source before has chosen."""
        number = self.layout.layers[layer]
        if number < self.sources[0]:
            return None
        if number in self.sources:
            self._chosen = self._choose(number, view)
        assert self._chosen is not None
        return page_tokens(self._chosen, view, self.page_size)[:, None, None]

    def _choose(self, source: int, view: View) -> Tensor:
        """[B, N] bool."""
        logits = self.watch.logits(source, view.slots)
        # The rows of one text are its queries; else each row has one.
        logits = (logits[0] if view.one_text else logits[:, -1]).masked_fill(
            ~view.exists, -torch.inf
        )
        if self.pool == "sum":
            scores = page_sums(logits.softmax(dim=1), view, self.page_size)
        else:
            scores = by_page(logits, view, self.page_size, -torch.inf).amax(dim=-1)
        return choose_pages(scores, view, self.page_size, self.pages, self.recent, self.sink)

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """Layers before the first source in full, the others K pages; see the base class."""
        del prompt
        held = np.ceil(lengths / self.page_size)
        missing = held * self.page_size - lengths
        sparse = np.minimum(lengths, self.pages * self.page_size - missing)
        full = sum(layer < self.sources[0] for layer in self.layout.layers)
        return full_layers_mean(self.layout, full, lengths, sparse)

    def overhead(self, lengths: Floats) -> Floats:
        """Index keys, as a share of a token's keys and values; see the base class."""
        config = self.watch.index.config
        share = config.width / config.token * len(self.sources) / len(self.layout.layers)
        mean: Floats = lengths * share
        return mean


@contextmanager
def known(model: Any, indexes: Mapping[str, Index]) -> Iterator[None]:
    """While it lasts, ``index:which=NAME`` is a policy of the laboratory on this model."""
    device = model.device
    watches = {name: Watch(index.to(device).eval()) for name, index in indexes.items()}
    before = TrainedIndex.watches
    POLICIES[TrainedIndex.name] = (TrainedIndex, {})
    TrainedIndex.watches = watches
    try:
        with watching(model, list(watches.values())):
            yield
    finally:
        TrainedIndex.watches = before
        del POLICIES[TrainedIndex.name]
