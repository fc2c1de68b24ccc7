"""Quest (arXiv 2406.10774): pages chosen by bounds on their attention logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deltadecode.lab.policies.base import Floats, Layout, Scores, View, pages_of
from deltadecode.lab.policies.masked import LayerAttention, MaskedPolicy
from deltadecode.lab.policies.pages import by_page, choose_pages, page_tokens

_SPARE = 64  # pages


class Quest(MaskedPolicy):
    """Each head reads the K pages with the largest upper bound on q · k (section 3.3, algorithm 1).

    A page keeps the channel-wise minimum m and maximum M of its keys (after the rotary embedding);
    its bound is Σ_d max(q_d m_d, q_d M_d). The first two layers (``dense``) read everything
    (section 3.4). The current page is one of the K, as in the authors' kernels.

    Under grouped-query attention, which the paper has not, each *query* head chooses (``shared``
    0); the tokens read are those that any query head of a KV head reads, up to G times the budget.
    With ``shared`` 1 (``quest-kv``) the query heads of a KV head choose together, by the largest
    of their bounds, and read exactly the budget.

    The bounds themselves are two vectors a page in every sparse layer: reported as metadata, one
    token's worth a page.
    """

    name = "quest"

    def __init__(
        self,
        layout: Layout,
        budget: int,
        page_size: int = 16,
        shared: int = 0,
        dense: int = 2,
    ) -> None:
        super().__init__(layout, budget)
        self.page_size, self.shared, self.dense = page_size, shared, dense
        self.pages = pages_of(self, budget, page_size, 2)
        self._bounds: dict[int, tuple[Tensor, Tensor]] = {}

    def prefill(self, layer: int, query: Tensor, key: Tensor, scores: Scores, view: View) -> None:
        """Make the bounds of the prompt's pages."""
        if layer < self.dense:
            return
        low, high = (
            torch.nn.functional.pad(bound, (0, 0, 0, _SPARE)) for bound in self._made(key, view)
        )
        self._bounds[layer] = low, high

    def _made(self, key: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of each page; keys [B, Hkv, slots, D] to [B, Hkv, N, D]."""
        by_channel = key.transpose(2, 3)
        bounds = []
        for fill, reduce in ((torch.inf, torch.amin), (-torch.inf, torch.amax)):
            bound = reduce(by_page(by_channel, view, self.page_size, fill), dim=-1)
            bound = bound.masked_fill(bound.isinf(), 0.0)  # pages that hold nothing yet
            bounds.append(bound.transpose(2, 3).contiguous())
        return bounds[0], bounds[1]

    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor | None:
        """Take the new key into its page's bounds, rank the pages, choose."""
        if layer < self.dense:
            return None
        count = -(-view.slots // self.page_size)
        if view.one_text:
            # A row's last page, which it may hold in part, is read whatever its bound is.
            low, high = self._made(attention.key, view)
        else:
            low, high = self._updated(layer, attention.key[:, :, -1], view, count)
        query = attention.query[:, :, None]
        upper = Scores(1.0).logits(query.clamp(min=0), high[:, :, :count])
        bound = (upper + Scores(1.0).logits(query.clamp(max=0), low[:, :, :count]))[:, :, :, 0]
        if self.shared:
            bound = bound.amax(dim=2, keepdim=True)
        chosen = choose_pages(bound, view, self.page_size, self.pages, recent=1)
        return page_tokens(chosen, view, self.page_size)

    def _updated(self, layer: int, new: Tensor, view: View, pages: int) -> tuple[Tensor, Tensor]:
        low, high = self._bounds[layer]
        if pages > low.shape[2]:
            low, high = (torch.nn.functional.pad(x, (0, 0, 0, _SPARE)) for x in (low, high))
            self._bounds[layer] = low, high
        last = view.lengths - 1
        page, begins = last // self.page_size, (last % self.page_size == 0)[:, None, None]
        row = torch.arange(page.shape[0], device=page.device)
        old_low, old_high = low[row, :, page], high[row, :, page]
        low[row, :, page] = torch.where(begins, new, torch.minimum(old_low, new))
        high[row, :, page] = torch.where(begins, new, torch.maximum(old_high, new))
        return low, high

    def overhead(self, lengths: Floats) -> Floats:
        """One token's worth a page in the sparse layers; see :meth:`Policy.overhead`."""
        layers = len(self.layout.layers)
        mean: Floats = np.ceil(lengths / self.page_size) * (max(layers - self.dense, 0) / layers)
        return mean

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """At most: if query heads that share keys agree on nothing; see :meth:`Policy.expected`."""
        del prompt
        layers = len(self.layout.layers)
        group = 1 if self.shared else self.layout.query_heads // self.layout.kv_heads
        held = np.ceil(lengths / self.page_size)
        missing = held * self.page_size - lengths
        most = self.pages * self.page_size - missing
        most += (group - 1) * (self.pages - 1) * self.page_size
        sparse = np.where(held <= self.pages, lengths, np.minimum(lengths, most))
        dense = min(self.dense, layers) / layers
        mean: Floats = dense * lengths + (1 - dense) * sparse
        return mean
