"""Whether a drafted token stays, so that the output is distributed as the full model's (R13)."""

from __future__ import annotations

import torch
from torch import Tensor


def choose(scores: Tensor, sample: bool) -> tuple[Tensor, Tensor | None]:
    """A token for each row, and what it was drawn from.

    Parameters
    ----------
    scores : Tensor
        [B, V], after the logits processors.
    sample : bool
        Draw one, instead of the largest.

    Returns
    -------
    tokens : Tensor
        [B] int64.
    probs : Tensor or None
        [B, V]; None when nothing is drawn.
    """
    if not sample:
        return scores.argmax(dim=-1), None
    probs = scores.softmax(dim=-1)
    return _draw(probs), probs


def verify(scores: Tensor, drafts: Tensor, probs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Accept a draft of each row, or give the token that stands in its place.

    Greedy: a draft stays if it is the largest. Sampling, with p the target's probabilities and q
    those of the draft: a draft x stays with probability min(1, p(x) / q(x)), else a token is drawn
    from max(0, p - q), normalised. Then the token is distributed as p (Leviathan et al., arXiv
    2211.17192, theorem 3.5; Chen et al., arXiv 2302.01318).

    Parameters
    ----------
    scores : Tensor
        [B, V] of the target, after the logits processors.
    drafts : Tensor
        [B] int64.
    probs : Tensor or None
        [B, V], what the drafts were drawn from; None: greedy.

    Returns
    -------
    tokens : Tensor
        [B] int64: the draft, or what stands in its place.
    accepted : Tensor
        [B] bool.
    """
    if probs is None:
        best = scores.argmax(dim=-1)
        return best, best == drafts
    target = scores.softmax(dim=-1)
    place = drafts[:, None]
    p, q = target.gather(1, place)[:, 0], probs.gather(1, place)[:, 0]
    # Below 1, so that a draft with p = q is never rejected; and one with p = 0 always is.
    accepted = torch.rand_like(p) * q < p
    rest = (target - probs).clamp(min=0)
    # Of two equal distributions nothing is left, and nothing is rejected.
    rest = torch.where(rest.sum(dim=1, keepdim=True) > 0, rest, target)
    return torch.where(accepted, drafts, _draw(rest)), accepted


def _draw(weights: Tensor) -> Tensor:
    if weights.is_cpu:
        return torch.multinomial(weights, num_samples=1)[:, 0]
    return draw_unseen(weights)


def draw_unseen(weights: Tensor) -> Tensor:
    """What ``torch.multinomial`` draws of [B, V], without its look at the weights.

    For that look the host waits for the device.
    """
    return (weights / torch.empty_like(weights).exponential_()).argmax(dim=-1)
