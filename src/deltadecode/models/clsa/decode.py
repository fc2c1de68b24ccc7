"""One new token a row: the index picks tokens, and the operations read only those."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from deltadecode import ops
from deltadecode.config import DeltaConfig


@functools.lru_cache(maxsize=64)
def selection(topk: int) -> DeltaConfig:
    """The exact top-k of tokens, as a selection of pages of one token, none of them forced."""
    return DeltaConfig(page_size=1, budget_pages=topk, recent_pages=0, sink_pages=0)


class Gathered:
    """Attention of one query a row to the tokens that the index picked.

    Parameters
    ----------
    scores : Tensor
        [B, T] index scores of a row's tokens, in their order.
    table, lengths : Tensor
        Block table [B, blocks] and tokens [B] of the rows, int32.
    topk : int
        Tokens to read, k.
    """

    def __init__(self, scores: Tensor, table: Tensor, lengths: Tensor, topk: int) -> None:
        self.table, self.lengths = table, lengths
        self.ids, self.counts = ops.select_pages(scores, lengths, selection(topk))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with q [B, Hq, 1, D] to k and v [B, Hkv, T, D], whose tokens lie together."""
        block = k.shape[0] * k.shape[2] // self._blocks(k)
        k, v = (x.transpose(1, 2).reshape(-1, block, x.shape[1], x.shape[3]) for x in (k, v))
        out: Tensor = ops.decode_attention(
            q[:, :, 0], k, v, self.table, self.lengths, scale=q.shape[3] ** -0.5, page_size=1,
            page_ids=self.ids, page_counts=self.counts,
        )  # fmt: skip
        return out[:, :, None]

    def _blocks(self, k: Tensor) -> int:
        # A block is a row, or a token where rows have padding between or before their tokens.
        return k.shape[0] if self.table.shape[1] == 1 else k.shape[0] * k.shape[2]


def gather(query: Tensor, keys: Tensor, valid: Tensor | None, topk: int) -> Gathered:
    """Pick the tokens of one query a row.

    Parameters
    ----------
    query, keys : Tensor
        [B, d], scaled, and [B, T, d].
    valid : Tensor, optional
        [B, T], False for padding.
    topk : int
        Tokens to read, k.
    """
    rows, tokens = keys.shape[:2]
    row = torch.arange(rows, dtype=torch.int32, device=keys.device)[:, None]
    if valid is None:
        table, lengths = row, torch.full_like(row[:, 0], tokens)
    else:
        # What is no padding, in its order, comes first.
        order = valid.sort(dim=1, descending=True, stable=True).indices.int()
        table, lengths = row * tokens + order, valid.sum(1, dtype=torch.int32)
    scores = (keys @ query[:, :, None])[..., 0]
    if valid is not None:
        scores = scores.gather(1, (table - row * tokens).long())
    return Gathered(scores, table, lengths, topk)
