"""Which pages drafts read in lossless mode, for every layer of a model (docs/semantics.md, R12).

All of it stays on the device: a captured graph of a draft works out its pages from these tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.engines.serving.settings import ServingSettings, budget_tokens

# What drafts have to gain by the bytes that are read, for all that those leave out.
_GAIN = 1.1
# Share of drafts that hold until it is measured, weight of one verification in the measure, and of
# a step without, by which it goes back.
_ACCEPTED, _NEWEST, _FADING = 0.7, 0.1, 0.001
# Rows and columns are multiples of it, so that what a layer reads is aligned as kernels want it.
_STEP = 4


@dataclass
class LayerPages:
    """What one layer's verifications select; views of a :class:`DraftPages`.

    Attributes
    ----------
    ids : Tensor
        [rows, columns] int32, selected pages, ascending.
    lengths : Tensor
        [rows] int32, tokens of the row when it selected them; 0 where it has selected none.
    """

    ids: Tensor
    lengths: Tensor

    def keep(self, ids: Tensor, seq_lens: Tensor) -> None:
        """Keep what B rows have selected: ids [B, K]."""
        count, columns = ids.shape
        self.ids[:count, :columns] = ids
        if columns < self.ids.shape[1]:
            self.ids[:count, columns:] = -1
        self.lengths[:count] = seq_lens


class DraftPages:
    """Pages of all layers that the drafts behind one verification read.

    They are what each layer selected by the verification's last token, below the page of the newest
    decided token, and all pages from that one on. A row that has selected nothing yet reads its
    sink pages and its newest ones, budget pages in all.

    Parameters
    ----------
    cfg : DeltaConfig
        Gives P, K, its share and S.
    layers, rows, drafts : int
        Layers that draft, most rows of a batch, and most drafts of a row.
    tokens : int
        That a row's block table has room for.
    device : torch.device
        Of the batch.
    """

    def __init__(
        self,
        cfg: DeltaConfig,
        layers: int,
        rows: int,
        drafts: int,
        tokens: int,
        device: torch.device,
    ) -> None:
        self._cfg = cfg
        self.rows = -(-rows // _STEP) * _STEP
        selected = cfg.table_width(-(-tokens // cfg.page_size))
        # Drafts begin inside of a page, and may end inside of another.
        new = 1 + -(-drafts // cfg.page_size)
        width = -(-(selected + new) // _STEP) * _STEP
        self._selected = torch.full(
            (layers, self.rows, selected), -1, dtype=torch.int32, device=device
        )
        self._lengths = torch.zeros(layers, self.rows, dtype=torch.int32, device=device)
        self.ids = torch.zeros(layers, self.rows, width, dtype=torch.int32, device=device)
        self.counts = torch.zeros(layers, self.rows, dtype=torch.int32, device=device)
        self._older = torch.zeros_like(self.counts)
        self._first = torch.zeros(self.rows, dtype=torch.int32, device=device)
        self._columns = torch.arange(width, dtype=torch.int32, device=device)

    def layer(self, place: int) -> LayerPages:
        """Where the ``place``-th layer keeps what it selects."""
        return LayerPages(self._selected[place], self._lengths[place])

    def begin(self, positions: Tensor) -> None:
        """List the pages of drafts whose first input tokens are at ``positions`` [rows] int64.

        What was selected counts once: the next drafts need another verification.
        """
        cfg, columns, found = self._cfg, self._columns, self._selected
        newest = (positions // cfg.page_size).to(torch.int32)
        fresh = self._lengths[0] > 0
        window = (newest - (cfg.budget_pages - cfg.sink_pages)).clamp(min=0)
        first = torch.where(fresh, newest, window)
        older = ((found >= 0) & (found < first[:, None])).sum(-1, dtype=torch.int32)
        older = torch.where(fresh, older, first.clamp(max=cfg.sink_pages))
        found = torch.nn.functional.pad(found, (0, len(columns) - found.shape[-1]))
        listed = torch.where(fresh[:, None], found, columns)
        newer = first[:, None] + columns - older[..., None]
        torch.where(columns < older[..., None], listed, newer, out=self.ids)
        self._older.copy_(older)
        self._first.copy_(first)
        self._lengths.zero_()

    def forget(self) -> None:
        """Let rows select anew before drafts read what they select."""
        self._lengths.zero_()

    def count(self, seq_lens: Tensor) -> None:
        """Set the counts of one draft of rows [rows] int32; 0 tokens: a row that drafts nothing."""
        pages = -(-seq_lens // self._cfg.page_size)
        self.counts.copy_((self._older + pages - self._first) * (seq_lens > 0))


class Worth:
    """Whether a batch drafts, by what passes read and by how many drafts have held lately.

    A step that gives one token of each row reads all weights and every row's cache. Lossless mode
    reads the weights once for each draft, too, and gives what the verification keeps.

    Parameters
    ----------
    settings : ServingSettings
        With a ``min_tokens`` other than the budget, the longest row alone decides.
    weights, token : int
        Bytes of all weights, and of a token's keys and values in all layers.
    drafts : int
        Of a row, where a batch drafts.
    """

    def __init__(self, settings: ServingSettings, weights: int, token: int, drafts: int) -> None:
        self._budget = budget_tokens(settings.config)
        self.told = settings.min_tokens != self._budget
        self._least = settings.min_tokens
        self._weights, self._token, self._drafts = weights, token, drafts
        self._first = self.kept = 1 + _ACCEPTED * drafts

    def measure(self, kept: Sequence[int]) -> None:
        """Take in the tokens that a step gave, of each row that had drafts; none without drafts."""
        # Without drafts nothing is known, and in time they get another try.
        if kept:
            self.kept += _NEWEST * (sum(kept) / len(kept) - self.kept)
        else:
            self.kept += _FADING * (self._first - self.kept)

    def pays(self, lengths: NDArray[np.int64]) -> bool:
        """Whether rows of so many tokens draft."""
        longest = int(lengths.max())
        if longest <= self._budget:
            return False
        if self.told:
            return longest >= self._least
        full = self._weights + self._token * int(lengths.sum())
        draft = self._weights + self._token * int(lengths.clip(max=self._budget).sum())
        return self.kept * full >= _GAIN * (self._drafts * draft + full)
