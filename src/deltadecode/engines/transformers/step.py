"""One forward pass: what it is, decided once, and at a decode step where the rows lie.

A pass is a decode step when it brings one new token per row behind a cache; every other pass is
prefill, full attention in every layer (docs/semantics.md, R1). Nothing of a pass survives it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.engines.transformers.rows import RowGroup, group_rows
from deltadecode.errors import ArgumentError
from deltadecode.ops import Scratch

# Of one Δ-layer: number of the row group -> page ids and page counts. A group within the budget
# selects nothing.
Selection = dict[int, tuple[Tensor, Tensor]]


@dataclass(eq=False)
class Rows:
    """Where the rows of a decode step lie, as one mask tells it.

    Attributes
    ----------
    groups : list of RowGroup
        The rows by where their tokens lie.
    device : torch.device
        Where the tensors of ``groups`` are.
    mask : Tensor or None
        Attention mask that ``groups`` was read from.
    every_page : bool
        No row has more pages than the budget, so that every layer attends to everything (R3).
    full_tokens, sparse_tokens : int
        Tokens that a full and a sparse layer read, over all rows.
    """

    groups: list[RowGroup]
    device: torch.device
    mask: Tensor | None
    every_page: bool
    full_tokens: int
    sparse_tokens: int

    @classmethod
    def of(cls, cfg: DeltaConfig, key: Tensor, mask: Tensor | None) -> Rows:
        """Read them from a layer's keys [B, Hkv, slots, D] and its mask."""
        page = cfg.page_size
        groups = group_rows(mask, key)
        full = sparse = 0
        every_page = True
        for group in groups:
            rows, tokens = len(group.members), group.length
            pages = -(-tokens // page)
            budget = cfg.pages_for(pages)
            full += rows * tokens
            if pages <= budget:
                sparse += rows * tokens
                continue
            every_page = False
            # The last page is partial and, if any recent page is forced, selected. Otherwise the
            # Δ-layer's selection says, and corrects the count.
            missing = pages * page - tokens if cfg.recent_pages else 0
            sparse += rows * (budget * page - missing)
        return cls(groups, key.device, mask, every_page, full, sparse)

    @property
    def together(self) -> bool:
        """Whether all rows have a token in every slot."""
        group = self.groups[0]
        return group.rows is None and group.slots is None and group.offset == 0

    def each_group(
        self, query: Tensor, attend: Callable[[int, RowGroup, Tensor], Tensor]
    ) -> Tensor:
        """Output, shaped like a query [B, ...], of one group of rows after the other.

        ``attend`` gets the number of a group, the group, and its rows of the query.
        """
        if self.groups[0].rows is None:
            return attend(0, self.groups[0], query)
        out = torch.empty_like(query)
        for place, group in enumerate(self.groups):
            out[group.rows] = attend(place, group, query[group.rows])
        return out


class Step:
    """One forward pass from any cache but a static one.

    Attributes
    ----------
    decodes : bool
        Whether it is a decode step.
    full : bool
        A decode step with full attention in all layers, since gradients are needed.
    rows : Rows or None
        Where the rows lie; None before the first planned layer.
    selections : dict
        Δ-layer -> what it has selected in this step.
    cache : DeltaCache or None
        The cache, if attention may have to read layers where they are stored.
    scratch : Scratch
        Memory of the kernels.
    """

    def __init__(self, decodes: bool, full: bool = False, cache: Any = None) -> None:
        self.decodes, self.full = decodes, full
        self.cache = cache
        self.rows: Rows | None = None
        self.selections: dict[int, Selection] = {}
        self.scratch = Scratch()

    def see_rows(self, cfg: DeltaConfig, key: Tensor, mask: Tensor | None) -> Rows:
        """The rows as a layer with these keys and this mask has them."""
        rows = self.rows
        # Another layer may have another view of them, as when the model spreads over devices.
        if (
            rows is None
            or rows.mask is not mask
            or (not rows.every_page and rows.device != key.device)
        ):
            rows = self.rows = Rows.of(cfg, key, mask)
        return rows


class LocalPass(threading.local):
    """The pass in progress. Per thread, so that two threads may decode with one model."""

    prefilling = False  # ``generate`` is at the prompt: one token is its last chunk
    step: Step | None = None
    # Its Drafting, in lossless mode, while ``generate`` decodes.
    drafting: Any = None
    graphed: Any = None  # its LayerPass, of a step with layer graphs
    recorder: Any = None  # of the layer in progress, while it is recorded
    # While ``generate`` runs: tokens of its prompt, and the Offload that takes memory for them.
    prompt = 0
    reserving: Any = None


class StaticPass:
    """The pass in progress from a static cache, as compiled graphs see it.

    Not per thread: what a compiled graph writes to a ``threading.local`` is lost, and it reads the
    defaults there. So only one thread at a time may use a model that decodes from a static cache.
    """

    def __init__(self) -> None:
        self.active = False  # whether the pass reads from a static cache
        self.prefilling = False
        self.decodes = False
        self.full = False
        self.tokens = 0  # new tokens per row
        self.step: StaticStep | None = None


@dataclass(eq=False)
class StaticStep:
    """One decode step from a static cache: where the rows lie, and what Δ-layers have selected.

    Attributes
    ----------
    offsets : Tensor
        [B] int32, slot of each row's first token.
    seq_lens : Tensor
        [B] int32, tokens n of each row, the new one included.
    counted : Tensor
        int64 scalar: 1, or 0 when the only token is a prompt.
    tables : dict
        KV heads, slots and device of a layer -> its block table [B, pages] int32.
    selections : dict
        Δ-layer -> page ids and page counts.
    """

    offsets: Tensor
    seq_lens: Tensor
    counted: Tensor
    tables: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict)
    selections: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: Tensor | None, key: Tensor) -> StaticStep:
        """Read it from a boolean mask [B or 1, 1, 1, slots] and keys [B, Hkv, slots, D]."""
        rows, _, slots, _ = key.shape
        if mask is None or mask.dtype != torch.bool or mask.shape[1:] != (1, 1, slots):
            described = "none" if mask is None else f"{mask.dtype} {list(mask.shape)}"
            raise ArgumentError(
                f"a decode step from a static cache needs a torch.bool mask [rows, 1, 1, {slots}], "
                f"got {described}"
            )
        valid = mask[:, 0, 0].expand(rows, slots)
        seq_lens = valid.sum(dim=1, dtype=torch.int32)
        offsets = valid.int().argmax(dim=1).int()
        # One token without a past is a prompt.
        counted = ((offsets + seq_lens).max() > 1).long()
        return cls(offsets, seq_lens, counted)

    def table(self, key: Tensor, page_size: int) -> Tensor:
        """Block table of a layer with these keys."""
        rows, heads, slots, _ = key.shape
        known = self.tables.get((heads, slots, key.device))
        if known is not None:
            return known
        row = torch.arange(rows, dtype=torch.int32, device=key.device) * (heads * slots)
        page = torch.arange(slots // page_size, dtype=torch.int32, device=key.device) * page_size
        table = (row + self.offsets.to(key.device))[:, None] + page
        # Beyond a row's last page the entries mean nothing, but must name blocks that exist.
        table = table.clamp(max=(rows - 1) * heads * slots + slots - page_size)
        self.tables[heads, slots, key.device] = table
        return table
