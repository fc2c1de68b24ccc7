"""KeyDiff (arXiv 2504.15364): the token goes whose key is most like the others."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from deltadecode.lab.policies.base import Layout, View
from deltadecode.lab.policies.evicting import EvictingPolicy


class KeyDiff(EvictingPolicy):
    """Eviction by the cosine of a key and the mean of the normalized keys (section 3).

    The anchor of a layer and KV head is the mean of the normalized keys that are left in the cache,
    after the rotary embedding. A token is worth minus the cosine of its key and the anchor, so that
    keys unlike the others stay. Queries and weights are not looked at. ``recent`` tokens are
    protected as in the paper's variant with a sliding window; by default none is, but the newest.

    Deviations: the prompt is read in one piece and cut once at its end, where the paper evicts
    after each block of 128 tokens; in decoding one token goes at a time.
    """

    name = "keydiff"

    def __init__(self, layout: Layout, budget: int, recent: int = 0) -> None:
        super().__init__(layout, budget)
        self.recent = max(recent, 1)
        if budget <= self.recent + 1:
            raise self._refuse(f"it needs more than its recent tokens, {self.recent + 1}")

    def worth(self, layer: int, key: Tensor, alive: Tensor, view: View) -> Tensor:
        """Minus the cosine of each key and the anchor; see :meth:`EvictingPolicy.worth`."""
        del layer, view
        unit = normalize(key.float() if key.dtype.itemsize < 4 else key, dim=3)
        anchor = normalize((unit * alive[..., None]).sum(dim=2), dim=2)
        return -(unit @ anchor[..., None])[..., 0]

    def fixed(self, view: View) -> Tensor:
        """The last tokens; see :meth:`EvictingPolicy.fixed`."""
        return view.position >= (view.lengths - self.recent)[:, None]
