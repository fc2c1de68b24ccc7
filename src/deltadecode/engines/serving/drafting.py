"""Which pages drafts read in lossless mode, for every layer of a model (docs/semantics.md, R12).

All of it stays on the device: a captured graph of a draft works out its pages from these tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.engines.draft_pages import count_older, list_pages
from deltadecode.engines.serving.settings import ServingSettings, budget_tokens
from deltadecode.engines.serving.step import ForwardPass, WaitingScores
from deltadecode.ops import compile_selections, select_pages

# What drafts have to gain by the bytes that are read, for all that those leave out.
_GAIN = 1.1
# Chance of a draft to hold until it is measured, and the largest; weight of a draft in a request's
# measure and in that of all, and by how much a step without drafts takes them back.
_ACCEPTED, _MOST_CHANCE = 0.9, 0.999
_NEWEST, _NEWEST_OF_ALL, _FADING = 0.05, 0.005, 0.001
# Page scores that layers of one pass may write before some are selected by: 64 MiB.
_SCORES = 2**24
# Rows and columns are multiples of it, so that what a layer reads is aligned as kernels want it.
_STEP = 4


class LayerPages:
    """What one layer's verifications select.

    A selection from a few rows takes hardly longer than launching it, and so do the copies behind
    it. Where layers can, they only write page scores, and one selection serves many of them.

    Parameters
    ----------
    pages : DraftPages
        Of all layers.
    place : int
        The layer's place among them. Layers run in this order.
    """

    def __init__(self, pages: DraftPages, place: int) -> None:
        self._pages, self._place = pages, place

    def compile_ahead(self, rows: int, width: int) -> None:
        """Compile what 1 to ``rows`` rows of ``width`` page scores select with, in all layers."""
        pages, counts = self._pages, set()
        if self._place:
            return  # all layers select with the same kernels
        for count in range(1, rows + 1):
            most = pages.layers_at_once(count, width)
            counts.update({count * most, count * (len(pages.ids) % most)} - {0})
        compile_selections(pages.config, sorted(counts), width, pages.ids.device)

    def room(self, forward: ForwardPass, rows: int, width: int) -> Tensor:
        """Where this layer writes page scores [rows, width] float32, before it calls `select`."""
        if forward.waiting is None:
            layers = self._pages.layers_at_once(rows, width, self._place)
            # Each layer's begin where kernels are compiled to write: at a multiple of 16 bytes.
            more = -rows % (_STEP // math.gcd(_STEP, width))
            scores = torch.empty(layers, rows + more, width, device=self._pages.ids.device)
            forward.waiting = WaitingScores(scores[:, :rows], self._place)
        return forward.waiting.scores[forward.waiting.count]

    def select(self, forward: ForwardPass, seq_lens: Tensor) -> None:
        """Select for as many layers as there was room for, once all of them have their scores."""
        waiting = forward.waiting
        assert waiting is not None
        waiting.count += 1
        if waiting.count == len(waiting.scores):
            self._select_waiting(forward, seq_lens)

    def keep(self, forward: ForwardPass, ids: Tensor, seq_lens: Tensor) -> None:
        """Keep what the layer has selected itself for B rows: ids [B, K]."""
        self._select_waiting(forward, seq_lens)
        self._pages.keep(self._place, ids[None], seq_lens)

    def _select_waiting(self, forward: ForwardPass, seq_lens: Tensor) -> None:
        waiting, forward.waiting = forward.waiting, None
        if waiting is not None:
            scores = waiting.scores[: waiting.count]
            ids, _ = select_pages(
                scores.flatten(0, 1), seq_lens.repeat(len(scores)), self._pages.config
            )
            self._pages.keep(waiting.first, ids.unflatten(0, scores.shape[:2]), seq_lens)


class DraftPages:
    """Pages of all layers that the drafts behind one verification read.

    They are what each layer selected by the verification's last token, below the page of the newest
    decided token, and all pages from that one on. A row that has selected nothing yet reads its
    sink pages and its newest ones, budget pages in all.

    Parameters
    ----------
    cfg : DeltaConfig
        Gives P, K, its share and S. Kept as ``config``.
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
        self.config = cfg
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
        return LayerPages(self, place)

    def layers_at_once(self, rows: int, width: int, place: int = 0) -> int:
        """Layers from ``place`` on whose page scores [rows, width] may exist at a time."""
        return max(1, min(len(self.ids) - place, _SCORES // max(1, rows * width)))

    def keep(self, place: int, ids: Tensor, seq_lens: Tensor) -> None:
        """Keep ids [layers, B, K] of layers from ``place`` on; seq_lens [B] int32."""
        layers, rows, columns = ids.shape
        mine = slice(place, place + layers), slice(rows)
        self._selected[mine][..., :columns] = ids
        if columns < self._selected.shape[-1]:
            self._selected[mine][..., columns:] = -1
        self._lengths[mine] = seq_lens

    def begin(self, positions: Tensor) -> None:
        """List the pages of drafts whose first input tokens are at ``positions`` [rows] int64.

        What was selected counts once: the next drafts need another verification.
        """
        cfg, columns, found = self.config, self._columns, self._selected
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
        pages = -(-seq_lens // self.config.page_size)
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
