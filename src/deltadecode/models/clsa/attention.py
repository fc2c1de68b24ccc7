"""How new tokens attend: over a window, over all tokens, or over those of the index.

A way to attend is made once a forward pass and used by all layers that share it. Queries are
[B, Hq, Q, D], keys and values [B, Hkv, T, D]; the Q queries are the last ones of the T tokens.
``valid`` [B, T] is False for padding, None where there is none. A query always sees its own token,
so that padding gives numbers, which nobody reads, and no NaN.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1024  # queries that attend at once under a mask


class Attend(Protocol):
    """A way to attend, for all layers of a kind in one forward pass."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Output [B, Hq, Q, D]."""


def scaled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Attend by PyTorch's function, without copies of the KV heads where there is one query."""
    rows, heads, queries, dim = q.shape
    groups = heads // k.shape[1]
    if queries == 1:
        packed = q.view(rows, k.shape[1], groups, dim)
        # With a mask, the result may lie in memory in another order.
        return F.scaled_dot_product_attention(packed, k, v, mask).reshape(q.shape)
    # With a mask, the kernels that share KV heads are not at hand, and the plain one takes the
    # memory of all logits.
    if mask is not None and groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        groups = 1
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal and mask is None, enable_gqa=groups > 1
    )


def seen(queries: int, tokens: int, valid: Tensor | None, device: torch.device) -> Tensor:
    """Tokens that each query may attend to: [B or 1, 1, Q, T], True at its own."""
    token = torch.arange(tokens, device=device)
    own = torch.arange(tokens - queries, tokens, device=device)[:, None]
    earlier = token <= own
    if valid is not None:
        earlier = earlier & (valid[:, None, :] | (token == own))
    return earlier.view(-1, 1, queries, tokens)


def blocks(queries: int, tokens: int) -> list[tuple[slice, int]]:
    """Blocks of the queries, with how many tokens come up to the last of each.

    Nothing is computed of most tokens that are later than a query.
    """
    ends = [min(first + BLOCK, queries) for first in range(0, queries, BLOCK)]
    firsts = [0, *ends[:-1]]
    return [
        (slice(first, end), tokens - queries + end) for first, end in zip(firsts, ends, strict=True)
    ]


class Full:
    """Attention to all tokens up to each query's own."""

    def __init__(self, queries: int, tokens: int, valid: Tensor | None, device: torch.device):
        self.causal = valid is None and queries == tokens
        self.mask = None
        if not self.causal and (valid is not None or queries > 1):
            self.mask = seen(queries, tokens, valid, device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend."""
        return scaled(q, k, v, self.mask, self.causal)


class Masked:
    """Attention to the tokens of a mask [B, 1, Q, T], False at all later than a query."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend."""
        parts = [
            scaled(q[:, :, some], k[:, :, :end], v[:, :, :end], self.mask[:, :, some, :end])
            for some, end in blocks(q.shape[2], k.shape[2])
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


class Window:
    """Attention to the last ``window`` tokens up to each query's own.

    A long prompt goes in chunks of a window, each of which sees itself and the chunk before: time
    and memory grow with the tokens, not with their square.
    """

    def __init__(
        self,
        queries: int,
        tokens: int,
        window: int,
        valid: Tensor | None,
        device: torch.device,
    ) -> None:
        # Tokens before the window of the first query are of no use.
        self.tokens = min(tokens, queries + window - 1)
        self.window, self.chunks = window, -(-self.tokens // window)
        if valid is not None:
            valid = valid[:, -self.tokens :]
        self.chunked = queries > 1 and self.chunks > 2
        self.mask: Tensor | None
        if self.chunked:
            self.mask = self._chunk_mask(valid, device)
        elif valid is None and queries == 1:
            self.mask = None
        else:
            near = seen(queries, self.tokens, valid, device)
            band = torch.ones(queries, self.tokens, dtype=torch.bool, device=device)
            self.mask = near & band.triu(self.tokens - queries - window + 1)

    def _chunk_mask(self, valid: Tensor | None, device: torch.device) -> Tensor:
        """Tokens of two chunks that the queries of the second see: [B or 1, chunks, 1, W, 2 W]."""
        window, total = self.window, self.chunks * self.window
        place, query = torch.arange(2 * window, device=device), torch.arange(window, device=device)
        band = (place > query[:, None]) & (place <= query[:, None] + window)
        if valid is None:
            valid = torch.ones(1, self.tokens, dtype=torch.bool, device=device)
        # A chunk of padding comes before the first.
        held = F.pad(valid, (total - self.tokens + window, 0), value=False)
        held = held.unfold(1, 2 * window, window)[:, :, None, :]
        own = place == query[:, None] + window
        return ((band & held) | own)[:, :, None]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend."""
        k, v = k[:, :, -self.tokens :], v[:, :, -self.tokens :]
        if not self.chunked or self.mask is None:
            return scaled(q, k, v, self.mask)
        rows, heads, queries, dim = q.shape
        kv_heads, window, total = k.shape[1], self.window, self.chunks * self.window
        front = (0, 0, total - self.tokens + window, 0)
        padded = F.pad(q, (0, 0, total - queries, 0))
        packed = padded.view(rows, heads, self.chunks, window, dim).transpose(1, 2)

        def pairs(x: Tensor) -> Tensor:
            """Each chunk behind the one before it: [B * chunks, Hkv, 2 W, D]."""
            both = F.pad(x, front).unfold(2, 2 * window, window)
            return both.permute(0, 2, 1, 4, 3).reshape(-1, kv_heads, 2 * window, dim)

        mask = self.mask.expand(rows, *self.mask.shape[1:]).flatten(0, 1)
        out = scaled(packed.reshape(-1, heads, window, dim), pairs(k), pairs(v), mask)
        out = out.view(rows, self.chunks, heads, window, dim).transpose(1, 2)
        return out.reshape(rows, heads, total, dim)[:, :, total - queries :]


def largest(scores: Tensor, held: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest scores of each row among those held, or of all that are.

    Ties go to the lower token, NaN ranks last (R4 of docs/semantics.md, with pages of one token).
    """
    if count >= scores.shape[-1]:
        return held
    # Finite, so that what is not held ranks behind everything that is.
    least = torch.finfo(scores.dtype).min
    scores = torch.nan_to_num(scores, nan=least, posinf=-least, neginf=least)
    scores = scores.masked_fill(~held, float("-inf"))
    border = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > border, scores == border
    wanted = count - above.sum(-1, keepdim=True, dtype=torch.int32)
    return (above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= wanted))) & held


class Observed:
    """Attends in another way, and adds up what full attention would give each token.

    ``mean`` is the mean of the dense softmax over all layers and heads, [B, Q, T] in float32 and
    without gradients: the target that the index learns.
    """

    def __init__(self, attend: Attend, mask: Tensor, layers: int, rows: int) -> None:
        self.attend, self.mask, self.layers = attend, mask, layers
        # Zeros and not None, so that a compiled layer is the same for the first and the others.
        self.mean = torch.zeros(rows, *mask.shape[2:], dtype=torch.float32, device=mask.device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend."""
        with torch.no_grad():
            # Not in place: checkpointing attends again when the loss already holds the mean.
            self.mean = self.mean + self._dense(q, k) / self.layers
        return self.attend(q, k, v)

    def _dense(self, q: Tensor, k: Tensor) -> Tensor:
        """Mean of the dense softmax over the heads of a layer, [B, Q, T]."""
        tokens = k.shape[2]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)
        q = q * q.shape[3] ** -0.5
        parts = []
        for some, end in blocks(q.shape[2], tokens):
            logits = q[:, :, some] @ k[:, :, :, :end]
            logits = logits.masked_fill_(~self.mask[:, :, some, :end], float("-inf"))
            dense = logits.softmax(-1, dtype=torch.float32).mean(1)
            parts.append(F.pad(dense, (0, tokens - end)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def index_loss_of(
    observed: Observed, query: Tensor, keys: Tensor, real: Tensor | None, topk: int
) -> dict[str, Tensor]:
    """KL of the index's softmax from the dense attention, and the share of it on its top-k.

    Means over the queries that are no padding, ``real`` [B, Q].
    """
    dense, held = observed.mean, observed.mask[:, 0]
    logits = (query @ keys.transpose(1, 2)).float().masked_fill(~held, float("-inf"))
    # Where the target is 0 the index may say what it likes, -inf too.
    log_index = logits.log_softmax(-1).masked_fill(~held, 0.0)
    loss = (torch.xlogy(dense, dense) - dense * log_index).sum(-1)
    if isinstance(observed.attend, Masked):
        picked = observed.attend.mask[:, 0]
    else:
        picked = largest(logits.detach(), held.expand_as(logits), topk)
    covered = (dense * picked).sum(-1)
    if real is not None:
        loss, covered = loss[real], covered[real]
    return {"index_loss": loss.mean(), "index_coverage": covered.mean()}
