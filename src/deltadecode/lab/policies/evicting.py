"""What policies share that evict one token of each KV head at a time, whatever tells them which."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from deltadecode.lab.policies.base import Floats, Scores, View
from deltadecode.lab.policies.masked import LayerAttention, MaskedPolicy
from deltadecode.lab.policies.pages import largest

_SPARE = 256  # slots


class EvictingPolicy(MaskedPolicy):
    """Keeps a budget of tokens for each layer and KV head: those that :meth:`worth` ranks first.

    The prompt is cut to the budget at its end; then each step that fills the budget evicts one
    token, which leaves room for the next. Tokens that :meth:`fixed` names stay.
    """

    evicts = True
    history = True

    _alive: dict[int, Tensor]
    _key: Tensor

    @abstractmethod
    def worth(self, layer: int, key: Tensor, alive: Tensor, view: View) -> Tensor:
        """What each token is worth, [B, Hkv, slots] and finite; the least goes first.

        ``key`` is [B, Hkv, slots, D]; ``alive`` [B, Hkv, slots] says which tokens are left.
        """

    @abstractmethod
    def fixed(self, view: View) -> Tensor:
        """[B, slots] bool, tokens that must not go."""

    def prefill(self, layer: int, query: Tensor, key: Tensor, scores: Scores, view: View) -> None:
        """Keep the prompt's best tokens, one fewer than the budget: the next needs its room."""
        del query, scores
        if layer == 0:
            self._alive = {}
        alive = view.exists[:, None].expand(key.shape[:3])
        if view.slots >= self.budget:
            worth = self.worth(layer, key, alive, view).masked_fill(~alive, -torch.inf)
            worth = worth.masked_fill((self.fixed(view) & view.exists)[:, None], torch.inf)
            alive = largest(worth, self.budget - 1) & alive
        self._alive[layer] = torch.nn.functional.pad(alive, (0, _SPARE), value=True)

    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor:
        """Read all that is left."""
        if view.slots > self._alive[layer].shape[2]:
            self._alive[layer] = torch.nn.functional.pad(
                self._alive[layer], (0, _SPARE), value=True
            )
        self._key = attention.key
        return self._alive[layer][:, :, None, : view.slots]

    def observe(self, layer: int, weights: Tensor, view: View) -> None:
        """Evict at most one token."""
        del weights
        alive = self._alive[layer][:, :, : view.slots]
        here = alive & view.exists[:, None]
        worth = self.worth(layer, self._key, here, view)
        worth = worth.masked_fill(~here | self.fixed(view)[:, None], torch.inf)
        victim = worth.argmin(dim=2, keepdim=True)
        over = here.sum(dim=2, keepdim=True) >= self.budget
        alive.scatter_(2, victim, alive.gather(2, victim) & ~over)

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """The whole budget; see :meth:`Policy.expected`."""
        del prompt
        return np.minimum(lengths, self.budget)
