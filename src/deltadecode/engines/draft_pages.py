"""The list of pages that a draft of lossless mode reads (docs/semantics.md, R12)."""

from __future__ import annotations

import torch
from torch import Tensor


def count_older(found: Tensor, first: Tensor) -> Tensor:
    """How many pages ``found`` [..., R, W], -1 for none, lie below the ``first`` [R] of new ones.

    [..., R] int32.
    """
    return ((found >= 0) & (found < first[:, None])).sum(-1, dtype=torch.int32)


def list_pages(older: Tensor, count: Tensor, first: Tensor, columns: Tensor, out: Tensor) -> None:
    """Fill ``out`` [..., R, C] with ``count`` [..., R] ``older`` pages, and all from ``first`` on.

    ``older`` is [..., R, W], and W at most C; ``columns`` are the numbers 0 ... C - 1. ``out``
    stays in its place, where graphs of drafts read it.
    """
    older = torch.nn.functional.pad(older, (0, len(columns) - older.shape[-1]))
    newer = first[:, None] + columns - count[..., None]
    torch.where(columns < count[..., None], older, newer, out=out)
