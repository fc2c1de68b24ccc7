"""Which pages drafts read in lossless mode, for every layer of a model (docs/semantics.md, R12).

All of it stays on the device: a captured graph of a draft works out its pages from these tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.engines.draft_pages import count_older, list_pages
from deltadecode.engines.serving.settings import ServingSettings, budget_tokens

# What drafts have to gain by the bytes that are read, for all that those leave out.
_GAIN = 1.1
# Chance of a draft to hold until it is measured, and the largest; weight of a draft in a request's
# measure and in that of all, and by how much a step without drafts takes them back.
_ACCEPTED, _MOST_CHANCE = 0.9, 0.999
_NEWEST, _NEWEST_OF_ALL, _FADING = 0.05, 0.005, 0.001
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
        older = count_older(found, first)
        older = torch.where(fresh, older, first.clamp(max=cfg.sink_pages))
        listed = torch.where(fresh[:, None], found, columns[: found.shape[-1]])
        list_pages(listed, older, first, columns, self.ids)
        self._older.copy_(older)
        self._first.copy_(first)
        self.forget()

    def forget(self) -> None:
        """Let rows select anew before drafts read what they select."""
        self._lengths.zero_()

    def count(self, seq_lens: Tensor) -> None:
        """Set the counts of one draft of rows [rows] int32; 0 tokens: a row that drafts nothing."""
        pages = -(-seq_lens // self._cfg.page_size)
        self.counts.copy_((self._older + pages - self._first) * (seq_lens > 0))


class Acceptance:
    """Chance of a draft to hold, of each request; a new one begins with that of all lately."""

    def __init__(self) -> None:
        self._all = _ACCEPTED
        self._own: dict[str, tuple[float, int]] = {}
        self._plain = 0

    def measure(self, name: str, drafts: int, kept: int) -> None:
        """Take in how many tokens a request kept of a step that verified its drafts."""
        chance = self._faded(name)
        # Behind a rejected one nothing is known.
        for held in [1.0] * min(kept - 1, drafts) + [0.0] * (kept <= drafts):
            chance += _NEWEST * (held - chance)
            self._all += _NEWEST_OF_ALL * (held - self._all)
        self._own[name] = chance, self._plain

    def rest(self) -> None:
        """Take in a step without drafts: what was known fades, and in time drafts are tried."""
        self._plain += 1
        self._all += _FADING * (_ACCEPTED - self._all)

    def forget(self, names: Iterable[str]) -> None:
        """Drop requests that have ended."""
        for name in names:
            self._own.pop(name, None)

    def of(self, names: Iterable[str]) -> NDArray[np.float64]:
        """Chances of requests, [rows]."""
        return np.array([self._faded(name) for name in names]).clip(max=_MOST_CHANCE)

    def _faded(self, name: str) -> float:
        if name not in self._own:
            return self._all
        chance, since = self._own[name]
        return _ACCEPTED + (chance - _ACCEPTED) * (1 - _FADING) ** (self._plain - since)


class Worth:
    """How many drafts a batch makes, by what passes read and by how many drafts hold.

    A step that gives one token of each row reads all weights and every row's cache. Lossless mode
    reads the weights once for each draft, too, and gives what the verification keeps.

    Parameters
    ----------
    settings : ServingSettings
        With a ``min_tokens`` other than the budget, the longest row alone decides.
    weights, token : int
        Bytes of all weights, and of a token's keys and values in all layers.
    drafts : int
        Most drafts of a row.
    """

    def __init__(self, settings: ServingSettings, weights: int, token: int, drafts: int) -> None:
        self._budget = budget_tokens(settings.config)
        self.told = settings.min_tokens != self._budget
        self._least = settings.min_tokens
        self._weights, self._token = weights, token
        self._choices = draft_choices(drafts)

    def may_pay(self, lengths: NDArray[np.int64]) -> bool:
        """Whether rows of so many tokens leave out anything."""
        longest = int(lengths.max())
        return longest > self._budget and (not self.told or longest >= self._least)

    def drafts(self, lengths: NDArray[np.int64], chances: NDArray[np.float64]) -> int:
        """Drafts that give most tokens for the bytes that are read; 0 where none do."""
        if self.told:
            return self._choices[-1]
        full = self._weights + self._token * int(lengths.sum())
        draft = self._weights + self._token * int(lengths.clip(max=self._budget).sum())
        rates = [kept_tokens(n, chances) / (n * draft + full) for n in self._choices]
        best = int(np.argmax(rates))
        return self._choices[best] if rates[best] * full >= _GAIN else 0


def draft_choices(most: int) -> list[int]:
    """Numbers of drafts that a batch may make, ascending; few, as each has graphs of its own."""
    return sorted({most, most // 2, most // 4} - {0})


def kept_tokens(drafts: int, chances: NDArray[np.float64]) -> float:
    """Tokens that a verification gives in the mean over rows."""
    return float(((1 - chances ** (drafts + 1)) / (1 - chances)).mean())
