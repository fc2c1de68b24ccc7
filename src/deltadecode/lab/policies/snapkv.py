"""SnapKV (arXiv 2404.14469): the prompt is compressed once, by what its last queries look at."""

from __future__ import annotations

import torch
from torch import Tensor

from deltadecode.errors import PolicyError
from deltadecode.lab.policies.base import Floats, Layout, Scores, View
from deltadecode.lab.policies.h2o import accumulated, keep_heavy
from deltadecode.lab.policies.masked import LayerAttention, MaskedPolicy


class SnapKV(MaskedPolicy):
    """Keep an observation window and the prompt tokens that it votes for (section 4, listing 1).

    At the end of prefill each head adds up the weights that the queries of the prompt's last
    ``window`` tokens give to the tokens before it, smooths them with a one-dimensional pooling over
    ``kernel`` tokens, and keeps the largest. What is generated is never evicted, so that the reads
    grow with the answer: the budget is the prompt's, the window included.

    Under grouped-query attention, which the paper has not, the query heads of a KV head add up
    their votes. The pooling is the maximum, the paper's kernel size is 7 for most of its tests.
    """

    name = "snapkv"
    evicts = True
    history = True  # the queries of the prompt

    def __init__(self, layout: Layout, budget: int, window: int = 32, kernel: int = 7) -> None:
        super().__init__(layout, budget)
        self.window, self.kernel = window, kernel
        if kernel % 2 == 0 or window < 1:
            raise PolicyError(
                f"policy 'snapkv' needs an odd kernel and a window of 1 or more, got {kernel} and "
                f"{window}"
            )
        if budget <= window:
            raise self._refuse(f"it needs more than its observation window of {window}")
        self._kept: dict[int, Tensor] = {}

    def prefill(self, layer: int, query: Tensor, key: Tensor, scores: Scores, view: View) -> None:
        """Vote, pool and keep."""
        first = max(view.slots - self.window, 0)
        votes = accumulated(query, key, scores, view, first=first).sum(dim=2)
        # The window is kept anyway, and must not lend its votes to its neighbours.
        votes[:, :, first:] = 0.0
        votes = torch.nn.functional.max_pool1d(
            votes, self.kernel, stride=1, padding=self.kernel // 2
        )
        self._kept[layer] = keep_heavy(votes, view, self.budget, self.window)

    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor:
        """Read what is left of the prompt, and all that was generated."""
        del attention
        kept = self._kept[layer]
        generated = view.slots - kept.shape[2]
        return torch.nn.functional.pad(kept, (0, generated), value=True)[:, :, None]

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """The budget and what was generated; see :meth:`Policy.expected`."""
        mean: Floats = min(prompt, self.budget) + lengths - prompt
        return mean
