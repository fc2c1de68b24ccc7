"""RaaS (arXiv 2502.11147): milestone tokens stay as long as they are used."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deltadecode.lab.policies.base import Floats, Layout, Scores, View, pages_of
from deltadecode.lab.policies.masked import LayerAttention, MaskedPolicy
from deltadecode.lab.policies.pages import page_sums, page_tokens, used_pages

_SPARE = 64  # pages


class RaaS(MaskedPolicy):
    """Evict the page that has gone unused for the longest time (section 3).

    Every page has the time of its last use: the step at which its attention weight was above α
    (``alpha``, 0.0001 in the paper), or at which it began. When a new page would go over budget,
    the page with the oldest time goes, the earliest of several. The prompt is never evicted, since
    tokens that matter again after a long time are in it; so the budget must hold the prompt. With
    ``keep_prompt`` 0 (``raas-evict``) it may go like everything else, which is not the paper's
    method but fits in budgets that the paper's does not; the prompt's pages then count as used in
    the order in which they stand.

    Deviations: weights are exact, where the authors' pages estimate them from a representative
    key; a page's weight is the sum over its tokens, and the largest of the query heads that share
    a KV head. Times are kept for each layer and KV head.
    """

    name = "raas"
    evicts = True
    history = True

    def __init__(
        self,
        layout: Layout,
        budget: int,
        page_size: int = 16,
        alpha: float = 1e-4,
        keep_prompt: int = 1,
    ) -> None:
        super().__init__(layout, budget)
        self.page_size, self.alpha, self.keep_prompt = page_size, alpha, keep_prompt
        self.pages = pages_of(self, budget, page_size, 2)
        self._alive: dict[int, Tensor] = {}
        self._used: dict[int, Tensor] = {}

    def check(self, longest_prompt: int) -> None:
        """Refuse prompts that fill the budget; see :meth:`Policy.check`."""
        least = -(-longest_prompt // self.page_size) + 2
        if self.keep_prompt and self.pages < least:
            raise self._refuse(
                f"it never evicts the prompt, and one of {longest_prompt} tokens needs "
                f"{least * self.page_size}"
            )

    def prefill(self, layer: int, query: Tensor, key: Tensor, scores: Scores, view: View) -> None:
        """Keep the prompt's pages, or as many of the last ones as fit."""
        del query, scores
        if layer == 0:
            self.check(view.slots if not view.padded else int(view.lengths.max()))
        pages = -(-view.slots // self.page_size) + _SPARE
        page = torch.arange(pages, device=key.device)
        shape = key.shape[0], key.shape[1], pages
        alive = torch.ones(shape, dtype=torch.bool, device=key.device)
        if not self.keep_prompt:
            # The page of the next token must find room: it may be a new one.
            next_page = (view.prompt // self.page_size)[:, None]
            alive &= (page > next_page - self.pages)[:, None]
        self._alive[layer] = alive
        # Before all steps, in order; pages to come are not used yet, and begin at their own time.
        self._used[layer] = (page - 2**31).expand(shape).clone()

    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor:
        """Read all that is left."""
        del attention
        count = -(-view.slots // self.page_size)
        if count > self._alive[layer].shape[2]:
            self._grow(layer)
        return page_tokens(self._alive[layer][:, :, :count], view, self.page_size)[:, :, None]

    def observe(self, layer: int, weights: Tensor, view: View) -> None:
        """Note which pages were used, and evict one if the next token begins a page."""
        page_weights = page_sums(weights, view, self.page_size).amax(dim=2)
        count = page_weights.shape[2]
        alive, used = self._alive[layer][:, :, :count], self._used[layer][:, :, :count]
        page = torch.arange(count, device=weights.device)
        pages = used_pages(view, self.page_size)[:, None]
        in_use = (page_weights > self.alpha) | (page == pages - 1)[:, None]
        used.masked_fill_(in_use, view.step)
        exists = alive & (page < pages)[:, None]
        begins = (view.lengths % self.page_size == 0)[:, None, None]
        over = begins & (exists.sum(dim=2, keepdim=True) >= self.pages)
        fixed = ~exists | (page == pages - 1)[:, None]
        if self.keep_prompt:
            prompt_pages = (view.prompt + self.page_size - 1) // self.page_size
            fixed = fixed | (page < prompt_pages[:, None])[:, None]
        # The earliest of equal times: argmin takes any, so the page breaks the tie.
        rank = (used * 2**20 + page).masked_fill(fixed, torch.iinfo(torch.int64).max)
        victim = rank.argmin(dim=2, keepdim=True)
        alive.scatter_(2, victim, alive.gather(2, victim) & ~over)

    def _grow(self, layer: int) -> None:
        for states, value in ((self._alive, True), (self._used, 0)):
            states[layer] = torch.nn.functional.pad(states[layer], (0, _SPARE), value=value)

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """The budget, the last page half filled on average; see :meth:`Policy.expected`."""
        del prompt
        held = np.ceil(lengths / self.page_size)
        missing = held * self.page_size - lengths
        return np.minimum(lengths, self.pages * self.page_size - missing)
