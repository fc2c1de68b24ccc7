"""The exact top-k of tokens by an index of one head (docs/clsa.md)."""

from __future__ import annotations

import functools

from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.ops.operations import index_scores, select_pages


@functools.lru_cache(maxsize=64)
def selection(topk: int) -> DeltaConfig:
    """The exact top-k of tokens, as a selection of pages of one token, none of them forced."""
    return DeltaConfig(page_size=1, budget_pages=topk, recent_pages=0, sink_pages=0)


def select_tokens(
    query: Tensor, keys: Tensor, table: Tensor, lengths: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """Select the ``topk`` tokens of one query a row: ids [B, k] and counts [B], int32.

    ``query`` is [B, d], scaled, ``keys`` [blocks, block_size, d], ``table`` [B, blocks_max] int32,
    and ``lengths`` [B] int32. A row of fewer tokens has as many ids, and -1 behind them.
    """
    scores = index_scores(query, keys, table, lengths)
    ids, counts = select_pages(scores, lengths, selection(topk))
    return ids, counts
