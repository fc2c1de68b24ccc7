"""Random Attention (arXiv 2609.03430): keep the prompt, and evict the rest at random."""

from __future__ import annotations

import torch
from torch import Tensor

from deltadecode.errors import PolicyError
from deltadecode.lab.policies.base import Layout, Scores, View
from deltadecode.lab.policies.evicting import EvictingPolicy
from deltadecode.lab.policies.random_pages import mixed


class RandomAttention(EvictingPolicy):
    """Uniformly random eviction in each KV head; the prompt and ``recent`` tokens stay.

    No score is computed: what a token draws hangs on the token, the layer, the KV head, the length
    of the row and the seed. The prompt is never evicted and is part of the budget, so the budget
    must hold it. With ``keep_prompt`` 0 (``random-attention-evict``) a random sample of it stays,
    which is not the paper's method but fits in budgets that the paper's does not.

    Deviations: one token goes at each step that fills the budget, where the authors let a buffer
    of 64 tokens fill before they draw; those 64 are the ``recent`` tokens here.
    """

    name = "random-attention"

    def __init__(
        self, layout: Layout, budget: int, recent: int = 64, keep_prompt: int = 1, seed: int = 0
    ) -> None:
        super().__init__(layout, budget)
        self.recent, self.keep_prompt, self.seed = recent, keep_prompt, seed
        if recent < 1:
            raise PolicyError(f"recent of policy {self.name!r} must be at least 1, got {recent}")
        if budget <= recent + 1:
            raise self._refuse(f"it needs more than its {recent} recent tokens and the next")

    def check(self, longest_prompt: int) -> None:
        """Refuse prompts that leave no room in the budget; see :meth:`Policy.check`."""
        least = longest_prompt + self.recent + 2
        if self.keep_prompt and self.budget < least:
            raise self._refuse(
                f"it never evicts the prompt, and one of {longest_prompt} tokens needs {least}"
            )

    def prefill(self, layer: int, query: Tensor, key: Tensor, scores: Scores, view: View) -> None:
        """Check that the prompt fits, or draw what stays of it."""
        if layer == 0:
            self.check(int(view.lengths.max()))
        super().prefill(layer, query, key, scores, view)

    def worth(self, layer: int, key: Tensor, alive: Tensor, view: View) -> Tensor:
        """A draw for each token; see :meth:`EvictingPolicy.worth`."""
        del alive
        head = torch.arange(key.shape[1], device=key.device)[:, None]
        number = view.position[:, None] * 4099 + head * 92_821 + layer * 1_000_003
        step = view.lengths[:, None, None] * 65_537
        return mixed(number + step + self.seed * 7_368_787).double()

    def fixed(self, view: View) -> Tensor:
        """The last tokens, and the prompt; see :meth:`EvictingPolicy.fixed`."""
        fixed = view.position >= (view.lengths - self.recent)[:, None]
        if self.keep_prompt:
            fixed = fixed | (view.position < view.prompt[:, None])
        return fixed
