"""Which tokens of a batch go through the cross-decoder, and what each of them reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltadecode import ops
from deltadecode.engines.vllm.clsa.caches import CacheMetadata, TokenCache
from deltadecode.ops.tokens import select_tokens

# Queries whose index scores are in memory at a time: of a long prompt they are many bytes.
CHUNK = 256


@dataclass
class Queries:
    """Tokens of a batch that attend, each as a row of its own.

    Attributes
    ----------
    tokens, places
        [Q] int64, where in the batch their input is, and where their output goes: behind the batch
        for rows without a new token. None where query i is token i.
    rows
        [Q] int64, the rows that they belong to; None where each is the one token of its row.
    lengths
        [Q] int32, tokens that each sees, itself included.
    """

    tokens: Tensor | None
    places: Tensor | None
    rows: Tensor | None
    lengths: Tensor

    def take(self, x: Tensor) -> Tensor:
        """Of [T, ...], what belongs to these tokens."""
        return x[: self.lengths.shape[0]] if self.tokens is None else x[self.tokens]

    def put(self, x: Tensor, tokens: int) -> Tensor:
        """[tokens, ...] with x [Q, ...] at its places, and zeros elsewhere."""
        if self.places is None and x.shape[0] == tokens:
            return x
        out = x.new_zeros(tokens + 1, *x.shape[1:])
        if self.places is None:
            out[: x.shape[0]] = x
        else:
            out[self.places] = x
        return out[:tokens]

    def table(self, cache: TokenCache, metadata: CacheMetadata) -> Tensor:
        """Block table of a cache, a row for each of them."""
        table = cache.table(metadata)
        return table if self.rows is None else table[self.rows]


def queries(metadata: CacheMetadata, tokens: int, early_exit: bool) -> Queries:
    """Each row's last token with ``early_exit``, else all ``tokens``; the host is not asked."""
    lengths = metadata.lengths
    if metadata.most == 1:
        return Queries(None, None, None, lengths)
    ends = metadata.starts[1:].long()
    if early_exit:
        last = (ends - 1).clamp(min=0)
        return Queries(last, last.where(metadata.starts.diff() > 0, tokens), None, lengths)
    place = torch.arange(metadata.tokens, device=ends.device)
    rows = torch.searchsorted(ends, place, right=True)
    # The last of them is as long as its row.
    return Queries(None, None, rows, (lengths[rows] - (ends[rows] - 1 - place)).int())


@dataclass
class Reads:
    """What the queries read of the shared keys and values, the same in all layers.

    ``ids`` and ``counts`` are the index's selection, None for everything.
    """

    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor
    ids: Tensor | None = None
    counts: Tensor | None = None

    def attend(self, q: Tensor) -> Tensor:
        """Attention of q [Q, Hq, D]."""
        out: Tensor = ops.decode_attention(
            q, self.k, self.v, self.table, self.lengths, scale=q.shape[2] ** -0.5, page_size=1,
            page_ids=self.ids, page_counts=self.counts,
        )  # fmt: skip
        return out


def select(
    query: Tensor, keys: Tensor, table: Tensor, lengths: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """Tokens of the largest scores of query [Q, d], scaled, against index keys in blocks."""
    found = []
    for first in range(0, max(1, query.shape[0]), CHUNK):
        part = slice(first, first + CHUNK)
        found.append(select_tokens(query[part], keys, table[part], lengths[part], topk))
    if len(found) == 1:
        return found[0]
    ids, counts = zip(*found, strict=True)
    return torch.cat(ids), torch.cat(counts)
