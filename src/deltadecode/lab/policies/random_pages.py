"""The floor of page selection: random pages beside the recent ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deltadecode.lab.policies.base import Floats, Layout, View, pages_of
from deltadecode.lab.policies.masked import LayerAttention, MaskedPolicy
from deltadecode.lab.policies.pages import choose_pages, page_tokens

_MIX = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)  # odd; 32 bits, so that products fit in 64


class RandomPages(MaskedPolicy):
    """K pages of every layer, drawn anew at each step: the last L and others at random.

    What a page draws hangs on the page, the layer, the length of the row and the seed, and on
    nothing else of the batch (docs/semantics.md, R6).
    """

    name = "random"

    def __init__(
        self,
        layout: Layout,
        budget: int,
        page_size: int = 16,
        recent_pages: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(layout, budget)
        self.page_size, self.recent, self.seed = page_size, recent_pages, seed
        self.pages = pages_of(self, budget, page_size, recent_pages + 1)

    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor:
        """Rank the pages by a hash."""
        del attention
        count = -(-view.slots // self.page_size)
        page = torch.arange(count, device=view.start.device)
        key = page * 4099 + layer * 1_000_003 + self.seed * 7_368_787
        draws = mixed(key + view.lengths[:, None] * 65_537)
        chosen = choose_pages(draws.double(), view, self.page_size, self.pages, recent=self.recent)
        return page_tokens(chosen, view, self.page_size)[:, None, None]

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """The last page is partly filled, half on average; see :meth:`Policy.expected`."""
        del prompt
        page = self.page_size
        held = np.ceil(lengths / page)
        read = np.minimum(lengths, self.pages * page - (held * page - lengths))
        return read if self.recent else np.minimum(lengths, self.pages * page)


def mixed(numbers: Tensor) -> Tensor:
    """Hash int64 numbers to 32 bits, so that near ones draw unlike each other."""
    for factor in _MIX:
        numbers = (numbers & 0xFFFFFFFF) * factor & 0xFFFFFFFF
        numbers = numbers ^ (numbers >> 15)
    return numbers
