"""How a batch divides: rows that DELTA computes, and rows that the engine's own attention does.

A row of one new token is a decode row, and so is one with no more than a token and the drafts that
the engine may make: it verifies them (R10). Longer rows are chunks of prompts. Decode rows come
first in a batch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NO_ROWS = np.zeros(0, dtype=bool)


@dataclass
class Rows:
    """The rows of one batch.

    Attributes
    ----------
    decode : int
        Decode rows, which come first; a padding row of a CUDA graph counts.
    tokens : int
        Queries of each decode row, Q. A row with fewer new tokens repeats older ones before them.
    decode_tokens : int
        New tokens of all decode rows.
    prefill : object or None
        The engine's metadata of the other rows; None when its metadata of the whole batch is
        theirs, or there are none.
    prompts : Tensor or None
        Boolean, at least as many as there are decode rows: those whose token is the last of a
        prompt, which a chunk or a prefix hit has left alone, or one of its last few. They are
        prefill (R1).
    flagged : bool
        Whether ``prompts`` may be true of a row of this batch. A captured graph asks them anyway.
    others : bool
        Whether there are other rows.
    block_table, seq_lens : Tensor or None
        Of the decode rows; None until a layer asks for them.
    drafts : DraftRows or None
        Where each query is, in rows of unlike numbers of new tokens.
    """

    decode: int
    tokens: int = 1
    decode_tokens: int = 0
    prefill: Any = None
    prompts: Tensor | None = None
    flagged: bool = True
    others: bool = False
    block_table: Tensor | None = None
    seq_lens: Tensor | None = None
    drafts: DraftRows | None = None


@dataclass
class DraftRows:
    """Decode rows of unlike numbers of new tokens, each as the Q last tokens of its sequence.

    Attributes
    ----------
    queries : Tensor
        [rows * Q], the token of the batch that each query is; any, where it is none of them.
    places : Tensor
        [tokens], the query that each token of the decode rows is.
    idle : Tensor
        Boolean [rows, Q], queries that are no new tokens.
    """

    queries: Tensor
    places: Tensor
    idle: Tensor


class PromptRows:
    """Which decode rows belong to prompts, at one address for captured graphs.

    Parameters
    ----------
    rows : int
        Most rows of a batch, padding included.
    device : torch.device
        Of the batch.

    Attributes
    ----------
    any : bool
        Whether a row of the last batch may be flagged.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self.any = False

    @cached_property
    def _flags(self) -> Tensor:
        # Not before the first batch: an engine may discard what it allocates together with its
        # cache (vLLM's sleep mode does), and these would be flags of no batch afterwards.
        return torch.zeros(self._rows, dtype=torch.bool, device=self._device)

    def update(self, prefilling: Tensor | None, count: int) -> Tensor:
        """Set the flags of a batch; nothing goes to the device while no row is flagged.

        ``prefilling`` has a boolean for each request (padding rows may be missing), ``count`` is
        the number of decode rows. Returns all [rows] flags.
        """
        if prefilling is not None and not prefilling.is_cpu:
            # Reading it here would wait for the device.
            there = prefilling[:count]
            self.any = True
            self._flags.zero_()
            self._flags[: len(there)] = there
            return self._flags
        # In NumPy, as in divide(); it counts in less time than it looks for any.
        flagged = _NO_ROWS if prefilling is None else prefilling.numpy()[:count]
        any_flagged = int(np.count_nonzero(flagged)) > 0
        if any_flagged or self.any:
            flags = torch.zeros(self._flags.shape, dtype=torch.bool)
            flags[: len(flagged)] = torch.from_numpy(flagged)
            self._flags.copy_(flags, non_blocking=True)
        self.any = any_flagged
        return self._flags


def divide(
    starts: Tensor,
    requests: int,
    tokens: int,
    longest: int,
    most: int,
    device: torch.device,
    uniform: Collection[int] = (),
) -> Rows:
    """Decode rows: those before the first one with more than ``most`` new tokens.

    ``starts`` has each request's first token and the end of the last one, on the CPU. ``requests``
    and ``tokens`` may include padding. ``longest`` is the most new tokens of a row. Rows that have
    the same number of them, one of ``uniform``, have so many queries, and all others ``most``.
    """
    if longest <= 1:
        count = min(requests, tokens)
        return Rows(count, decode_tokens=count)
    # NumPy's small operations cost a third of PyTorch's, and every step of an engine waits here.
    ends = starts[: requests + 1].numpy()
    new, ends = np.diff(ends), ends[1:]
    is_longer = new > most
    count = int(is_longer.argmax()) if is_longer.any() else len(new)
    new, ends = new[:count], ends[:count]
    if (new == 1).all():
        return Rows(count, decode_tokens=count)
    # Padding rows of a graph have no tokens, nor have any rows while it is captured.
    full = int(np.count_nonzero(new))
    each = int(new[0]) if full and new[0] in uniform else most
    if (new[:full] == each).all() and count * each <= tokens:
        return Rows(count, each, count * each)
    rows = Rows(count, most, int(ends[-1]))
    back = np.arange(most - 1, -1, -1, dtype=np.int32)
    queries = (ends[:, None] - 1 - back).clip(min=0)
    idle = back >= new[:, None]
    places = np.flatnonzero(~idle)
    rows.drafts = DraftRows(
        _to(device, queries.ravel(), torch.int32),
        _to(device, places, torch.int32),
        _to(device, idle, torch.bool),
    )
    return rows


# Memory that is not pinned has been read when a copy returns; it need not wait for what runs, too.
def _to(device: torch.device, values: NDArray[Any], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(values).to(device, dtype, non_blocking=True)


def narrow_table(block_table: Tensor, block_size: int, longest: int) -> Tensor:
    """Only the columns of [B, blocks] that a batch with ``longest`` tokens a row reaches.

    On a GPU it is the table itself: a captured graph's rows may outgrow this batch, and kernels are
    compiled for a number of splits, which follows from the width.
    """
    if block_table.is_cuda:
        return block_table
    return block_table[:, : max(1, -(-longest // block_size))]
