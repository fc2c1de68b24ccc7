"""One new token a row: the index picks tokens, and the operations read only those."""

from __future__ import annotations

import torch
from torch import Tensor

from deltadecode import ops
from deltadecode.ops.tokens import select_tokens


class Paged:
    """Attention of one query a row, by the operations.

    Parameters
    ----------
    table, lengths : Tensor
        Block table [B, blocks] and tokens [B] of the rows, int32. A block is a row, or a token.
    ids, counts : Tensor, optional
        Tokens that the rows read, [B, k] and [B] int32; all of them without.
    """

    def __init__(
        self,
        table: Tensor,
        lengths: Tensor,
        ids: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        self.table, self.lengths, self.ids, self.counts = table, lengths, ids, counts

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with q [B, Hq, 1, D] to k and v [B, Hkv, T, D]; of blocks of one token, dense."""
        k, v = (_blocks(x.transpose(1, 2), self.table) for x in (k, v))
        query = q[:, :, 0].to(k.dtype)  # another one under autocast
        out: Tensor = ops.decode_attention(
            query, k, v, self.table, self.lengths, scale=q.shape[3] ** -0.5, page_size=1,
            page_ids=self.ids, page_counts=self.counts,
        )  # fmt: skip
        return out[:, :, None]


def pick(query: Tensor, keys: Tensor, table: Tensor, lengths: Tensor, topk: int) -> Paged:
    """Pick the tokens of one query a row, once for all layers.

    ``query`` is [B, d], scaled, and ``keys`` [B, T, d]; the rest as for :class:`Paged`.
    """
    query = query.to(keys.dtype)
    selected = select_tokens(query, _blocks(keys, table), table, lengths, topk)
    return Paged(table, lengths, *selected)


def rows_of(keys: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Block table and tokens of rows [B, T, d] of which ``valid`` [B, T] are no padding, or all."""
    rows, tokens = keys.shape[:2]
    row = torch.arange(rows, dtype=torch.int32, device=keys.device)[:, None]
    if valid is None:
        return row, torch.full_like(row[:, 0], tokens)
    # Blocks of one token; what is no padding comes first, in its order.
    order = valid.sort(dim=1, descending=True, stable=True).indices.int()
    return row * tokens + order, valid.sum(1, dtype=torch.int32)


def _blocks(x: Tensor, table: Tensor) -> Tensor:
    """[B, T, ...] as the blocks that a table names: rows, or tokens."""
    return x if table.shape[1] == 1 else x.flatten(0, 1)[:, None]
