"""The ceiling of page selection: each layer reads the pages that its own attention weighs most."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from deltadecode.lab.policies.base import Floats, Layout, View, pages_of
from deltadecode.lab.policies.masked import LayerAttention, MaskedPolicy
from deltadecode.lab.policies.pages import choose_pages, page_sums, page_tokens


class Oracle(MaskedPolicy):
    """Exact top-K pages of every layer, by DELTA's page score (arXiv 2510.09883, section 3).

    It knows full attention's weights without reading for them, which no real policy can; only
    the pages it then attends to are counted. No page is forced.
    """

    name = "oracle"

    def __init__(self, layout: Layout, budget: int, page_size: int = 16) -> None:
        super().__init__(layout, budget)
        self.page_size, self.pages = page_size, pages_of(self, budget, page_size, 1)

    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor:
        """S_u of the layer's own weights (docs/semantics.md, R2), and the K largest."""
        del layer
        page_scores = page_sums(attention.weights.amax(dim=(1, 2)), view, self.page_size)
        chosen = choose_pages(page_scores, view, self.page_size, self.pages)
        return page_tokens(chosen, view, self.page_size)[:, None, None]

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """Full pages; see :meth:`Policy.expected`."""
        del prompt
        return np.minimum(lengths, self.pages * self.page_size)
