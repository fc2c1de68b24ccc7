"""Kascade (arXiv 2512.16391): anchor layers choose tokens for each KV head, the others reuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltadecode.errors import PolicyError
from deltadecode.lab.policies.base import Floats, Layout, Scores, View
from deltadecode.lab.policies.kascade_fit import Development, KascadeFit
from deltadecode.lab.policies.layers import full_layers_mean, places_of
from deltadecode.lab.policies.masked import LayerAttention, MaskedPolicy
from deltadecode.lab.policies.pages import largest


class Kascade(MaskedPolicy):
    """Exact top-k tokens of each KV head at anchor layers, reused under a head map (section 3).

    At an anchor the softmax weights of the query heads of a KV head are added up, and the K tokens
    with the largest sums are read, by the anchor itself and by the layers up to the next anchor.
    There each KV head takes the tokens of the anchor's head that its map names. Layer 0 is always
    an anchor, and reads everything. Anchors compute the logits of all keys: what they read of keys
    beside their K tokens is reported as metadata, half a token each.

    Anchors and head map are fitted to a development text by the paper's dynamic program; see
    :class:`KascadeFit`. ``fit`` names a file of it. Without one, ``anchors`` layers are fitted to
    the first row of the first prompt that the policy sees. With ``layers``, those are the anchors
    (beside layer 0), and each head keeps its number.

    Deviations: prefill is full attention, where the paper's is sparse as well (its decode-only
    variant). K is the budget, where the paper has a tenth of the tokens, and at least 128.
    """

    name = "kascade"

    def __init__(
        self,
        layout: Layout,
        budget: int,
        layers: Sequence[int] | None = None,
        anchors: int = 5,
        fit: str = "",
    ) -> None:
        super().__init__(layout, budget)
        if layers is not None and fit:
            raise PolicyError("policy 'kascade' takes layers or a fit, not both")
        depth = len(layout.layers)
        if not 1 <= anchors <= depth:
            raise PolicyError(f"anchors of policy 'kascade' must be 1 to {depth}, got {anchors}")
        self.count = anchors
        self.fit: KascadeFit | None = None
        if fit:
            self.fit = KascadeFit.load(Path(fit), depth, layout.kv_heads)
        elif layers is not None:
            same = tuple(range(layout.kv_heads))
            places = places_of(self.name, layout, layers, [])
            self.fit = KascadeFit(tuple(sorted({0, *places})), (same,) * depth)
        self.history = self.fit is None  # the fit needs the prompt
        self._chosen: Tensor | None = None
        self.development: Development | None = None

    @contextmanager
    def decoding(self, model: Any) -> Iterator[None]:
        """While it lasts, ``model.generate`` decodes with this policy; see the class on fitting."""
        if self.fit is not None:
            with super().decoding(model):
                yield
            return
        self.development = Development(model, self.layout.layers, self.budget)
        with super().decoding(model), self.development.watching():
            yield

    def prefill(self, layer: int, query: Tensor, key: Tensor, scores: Scores, view: View) -> None:
        """Fit anchors and head map, if there are none."""
        if self.fit is not None or self.development is None:
            return
        start = int(view.start[0])
        self.development.see(layer, query[:1, :, start:], key[:1, :, start:], scores)
        if layer == len(self.layout.layers) - 1:
            self.fit = self.development.fit(self.count)

    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor | None:
        """Choose at an anchor, else reuse."""
        if self.fit is None:
            raise PolicyError("policy 'kascade' has no anchors yet: give it layers or a fit")
        if layer in self.fit.anchors:
            pooled = attention.weights.sum(dim=2, keepdim=True)
            pooled = pooled.masked_fill(~view.exists[:, None, None], -torch.inf)
            self._chosen = largest(pooled, self.budget)
            return None if layer == 0 else self._chosen
        assert self._chosen is not None  # layer 0 is an anchor
        return self._chosen[:, list(self.fit.heads[layer])]

    def overhead(self, lengths: Floats) -> Floats:
        """Keys of anchors that are only looked at; see :meth:`Policy.overhead`."""
        anchors = self.count if self.fit is None else len(self.fit.anchors)
        others = np.maximum(lengths - self.budget, 0.0) / 2
        mean: Floats = others * (anchors - 1) / len(self.layout.layers)
        return mean

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """Layer 0 reads n, the others the budget; see :meth:`Policy.expected`."""
        del prompt
        return full_layers_mean(self.layout, 1, lengths, np.minimum(lengths, self.budget))
