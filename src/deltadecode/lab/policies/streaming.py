"""StreamingLLM (arXiv 2309.17453): attention sinks and a sliding window."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from deltadecode.lab.policies.base import Floats, Layout, View
from deltadecode.lab.policies.masked import LayerAttention, MaskedPolicy


class Streaming(MaskedPolicy):
    """The first four tokens (table 2) and the last ones, in every layer (section 3.2, figure 4).

    Deviation: tokens keep the rotary positions that they had. The paper numbers positions within
    the cache, so as to go past the length a model was trained for; here contexts stay within it,
    and the window's relative positions are the same either way.
    """

    name = "streaming"
    evicts = True

    def __init__(self, layout: Layout, budget: int, sinks: int = 4) -> None:
        super().__init__(layout, budget)
        self.sinks = sinks
        if budget <= sinks:
            raise self._refuse(f"it needs more than its {sinks} sinks")

    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor:
        """By position alone."""
        del layer, attention
        window = view.lengths[:, None] - (self.budget - self.sinks)
        read = (view.position < self.sinks) | (view.position >= window)
        return read[:, None, None]

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """The whole budget; see :meth:`Policy.expected`."""
        del prompt
        return np.minimum(lengths, self.budget)
