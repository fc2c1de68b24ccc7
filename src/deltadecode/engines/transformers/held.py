"""The tokens that drafts read: a copy of each layer's selected pages, made once for all drafts.

A draft is then plain attention over few tokens: no page table is read, and no row waits for the
layout of another. Tokens stand at the right end, so that those of the drafts follow all rows alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.engines.transformers.rows import RowGroup
from deltadecode.ops import select_pages
from deltadecode.ops.torch import gather_pages


@dataclass(eq=False)
class Part:
    """What the rows of one group hold.

    Attributes
    ----------
    group : RowGroup
        With the tokens n that stay in the cache behind a verification.
    pages : Tensor or None
        [layers, R, W] int32, ascending, -1 first: whole pages that are selected, without the last
        one, partly filled. None: all of them, since the rows are within the budget.
    gaps : bool
        Whether some of ``pages`` can be -1.
    """

    group: RowGroup
    pages: Tensor | None
    gaps: bool = False

    @classmethod
    def of(cls, group: RowGroup, scores: Tensor, cfg: DeltaConfig) -> Part:
        """Select by the scores [layers, R, pages] of the last of the rows' tokens."""
        whole, tail = divmod(group.length, cfg.page_size)
        pages = whole + (tail > 0)
        if cfg.reads_all(group.length):
            return cls(group, None)
        lengths = group.seq_lens.to(scores.device).repeat(len(scores))
        ids, _ = select_pages(scores.flatten(0, 1), lengths, cfg)
        ids = ids[:, : cfg.pages_for(pages)]
        ids = ids.masked_fill(ids >= whole, -1).sort(dim=1).values
        ids = ids.view(*scores.shape[:2], ids.shape[1])
        # With recent pages, every row has selected the last one.
        full = tail == 0 or cfg.recent_pages > 0
        return cls(group, ids[..., 1:] if tail and full else ids, gaps=not full)

    def to(self, device: torch.device) -> Part:
        """The same on the device of a layer."""
        if self.group.device == device:
            return self
        pages = None if self.pages is None else self.pages.to(device)
        return Part(self.group.to(device), pages, self.gaps)

    def tail(self, page_size: int) -> int:
        """Tokens on the last page, if it is not full; they are held in any case."""
        return self.group.length % page_size

    def tokens(self, page_size: int) -> int:
        """Tokens of a row of the copy; of some rows one page is no token's."""
        whole = self.group.length // page_size if self.pages is None else self.pages.shape[2]
        return whole * page_size + self.tail(page_size)


class Held:
    """One layer's copy: keys and values [B, Hkv, T + drafts, D], of which ``used`` tokens count.

    ``place`` is the layer's in the pages of each part. Key and value are [B, Hkv, slots, D].
    """

    def __init__(
        self,
        parts: Sequence[Part],
        place: int,
        key: Tensor,
        value: Tensor,
        page_size: int,
        drafts: int,
    ) -> None:
        sizes = [part.tokens(page_size) for part in parts]
        self.used = max(sizes)
        rows, heads, _, dim = key.shape
        shape = rows, heads, self.used + drafts, dim
        self.mask: Tensor | None = None
        self._hidden: int | None = None
        masked = min(sizes) < self.used or any(part.gaps for part in parts)
        if masked:
            self.mask = torch.zeros(rows, 1, 1, shape[2], dtype=torch.bool, device=key.device)
            self.mask[..., self.used :] = True
        # Zeros, since what a mask hides still is a factor.
        self.keys, self.values = (
            states.new_zeros(shape) if masked else states.new_empty(shape)
            for states in (key, value)
        )
        for part in parts:
            self._copy(part, place, key, value, page_size)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hold a token [B, Hkv, 1, D] of each row, and give all keys, values and their mask."""
        place = self.used
        self.used += 1
        self.keys[:, :, place : self.used] = key
        self.values[:, :, place : self.used] = value
        mask = self.mask if self.mask is None else self.mask[..., : self.used]
        return self.keys[:, :, : self.used], self.values[:, :, : self.used], mask

    @property
    def tokens(self) -> int:
        """Tokens that a draft reads, over all rows."""
        if self._hidden is None:
            self._hidden = 0 if self.mask is None else int((~self.mask[..., : self.used]).sum())
        return self.used * len(self.keys) - self._hidden

    def _copy(self, part: Part, place: int, key: Tensor, value: Tensor, page_size: int) -> None:
        group, tail = part.group, part.tail(page_size)
        end = self.used - tail
        if part.pages is None:
            whole = group.length // page_size
            ids = torch.arange(whole, dtype=torch.int32, device=key.device)
            ids = ids.expand(len(group.members), -1)
        else:
            ids = part.pages[place]
        start = end - ids.shape[1] * page_size
        rows = slice(None) if group.rows is None else group.rows
        if self.mask is not None:
            seen = (ids >= 0).repeat_interleave(page_size, dim=1)
            self.mask[rows, 0, 0, start:end] = seen
            self.mask[rows, 0, 0, end : self.used] = True
        ids = ids.clamp(min=0) if part.gaps else ids
        caches = group.blocks(key, page_size), group.blocks(value, page_size)
        pages = gather_pages(caches, group.block_table, ids, page_size)
        last: slice | Tensor = slice(
            group.offset + group.length - tail, group.offset + group.length
        )
        if group.slots is not None:
            last = group.slots[group.length - tail :]
        for ours, theirs, selected in zip(
            (self.keys, self.values), (key, value), pages, strict=True
        ):
            ours[rows, :, start:end] = selected
            if tail:
                ours[rows, :, end : self.used] = theirs[:, :, last][rows]
