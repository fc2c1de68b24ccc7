"""OmniKV (Hao et al., ICLR 2025): filter layers choose the context of the layers after them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deltadecode.errors import PolicyError
from deltadecode.lab.policies.base import Floats, Layout, View
from deltadecode.lab.policies.layers import full_layers_mean, places_of
from deltadecode.lab.policies.masked import LayerAttention, MaskedPolicy
from deltadecode.lab.policies.pages import largest

_FILTERS = (2 / 32, 8 / 32, 18 / 32)  # of the depth: layers 2, 8 and 18 of Llama-3-8B


class OmniKV(MaskedPolicy):
    """Dynamic context selection by the last token's attention (section 3, algorithm 1).

    A filter layer reads everything; the K tokens of the prompt with the largest softmax weights,
    the maximum over all query heads, are the context of the layers up to the next filter layer.
    Layers before the first filter layer read everything, and so do the ``wait`` layers after each,
    during which the authors load the chosen tokens to the GPU. What is generated is always read,
    so that the reads grow with the answer: the budget is the prompt's.

    The paper finds filter layers for each model by how well their choice suits the layers after
    them. By default they stand at the depths that the authors use for Llama-3-8B; ``layers``
    names others. Deviation: nothing is moved to the host's memory, which changes no result.
    """

    name = "omnikv"

    def __init__(
        self, layout: Layout, budget: int, layers: Sequence[int] | None = None, wait: int = 1
    ) -> None:
        super().__init__(layout, budget)
        depth = len(layout.layers)
        self.filters = places_of(
            self.name, layout, layers, [min(round(depth * f), depth - 1) for f in _FILTERS]
        )
        if wait >= depth:
            raise PolicyError(f"wait of policy {self.name!r} must be less than {depth}, got {wait}")
        waiting = {place + step for place in self.filters for step in range(wait + 1)}
        self.full = set(range(self.filters[0])) | {place for place in waiting if place < depth}
        self._read: Tensor | None = None

    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor | None:
        """Choose at a filter layer; else reuse, or read everything."""
        if layer in self.filters:
            self._read = self._context(attention, view)
        return None if layer in self.full else self._read

    def _context(self, attention: LayerAttention, view: View) -> Tensor:
        generated = view.position >= view.prompt[:, None]
        scores = attention.weights.amax(dim=(1, 2))
        scores = scores.masked_fill(generated | ~view.exists, -torch.inf)
        return (largest(scores, self.budget) | generated)[:, None, None]

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """Full layers read n, the others the budget and the answer; see :meth:`Policy.expected`."""
        others = np.minimum(prompt, self.budget) + lengths - prompt
        return full_layers_mean(self.layout, len(self.full), lengths, others)
