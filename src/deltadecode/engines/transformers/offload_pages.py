"""Which pages lie in the device pools of sparse layers, and where.

All sparse layers of one Δ-layer read the same pages at every step, so one directory serves all of
their pools. Its tensors stay on the device of the Δ-layer: nothing here waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.engines.transformers.rows import RowGroup

# Columns of a block table are a multiple of this.
_COLUMNS = 64
_NEVER = torch.iinfo(torch.int64).max


def pool_pages(cfg: DeltaConfig, tokens: int) -> int:
    """Pages of a row that a pool is made for when the row has so many tokens."""
    most = cfg.pages_for(-(-tokens // cfg.page_size))
    # Twice the budget: half of it may be pages of earlier steps. A share of the pages grows with
    # them, and gets room for some steps.
    return most + (most // 8 if cfg.budget_share else 0) + cfg.budget_pages


@dataclass(eq=False)
class PageRequest:
    """The pages that the sparse layers of a Δ-layer read of one row group, in one step.

    Attributes
    ----------
    row_numbers : Tensor
        [R] int64, the rows of the group.
    cells : Tensor
        [R, width] int64, cell of each page in the pool; of columns that mean nothing a spare cell.
    missing : Tensor
        [R, width] bool, pages that have to be fetched.
    tokens : Tensor
        [R, width, P] int64, slots of a page's tokens; -1 for those not on the host yet.
    table : Tensor
        [R, pages or more] int32 block table of the pool; 0 for pages that are not selected.
    newest : Tensor
        [R] int64, cell of the page with the new token; a spare cell if that is not in the pool.
    place : int
        Place of the new token on its page.
    """

    row_numbers: Tensor
    cells: Tensor
    missing: Tensor
    tokens: Tensor
    table: Tensor
    newest: Tensor
    place: int

    def to(self, device: torch.device) -> PageRequest:
        """The same on another device."""
        if self.cells.device == device:
            return self
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


class PageDirectory:
    """The pages in the pools of one Δ-layer's sparse layers.

    Lookup is exact: a page is where the directory says, with all of its tokens. Among the pages
    that a step does not select, those unused the longest make room.

    Attributes
    ----------
    capacity : int
        Pages of a row that a pool holds. Row b has cells ``b * (capacity + 1)`` on; the last one
        of a row is spare.
    """

    def __init__(self) -> None:
        self.capacity = 0
        self.forget()

    def forget(self) -> None:
        """Hold no pages: the tokens behind them have changed."""
        # Cache length at the last step; pools are right for the step after it, and no other.
        self._length = -1

    def begin(self, cfg: DeltaConfig, rows: int, length: int, device: torch.device) -> None:
        """Begin a step with ``length`` slots, the new one included."""
        most = cfg.pages_for(-(-length // cfg.page_size))
        grows = most > self.capacity
        if grows:
            self.capacity = pool_pages(cfg, length)
        # Nothing is held before the first step, and after a forgotten one.
        follows = 0 <= self._length == length - 1
        if grows or not follows or self.held.shape[0] != rows or self.held.device != device:
            self._clear(rows, device)
        self._length = length
        self._clock += 1

    def request(
        self, cfg: DeltaConfig, group: RowGroup, ids: Tensor, counts: Tensor
    ) -> PageRequest:
        """Find the selected pages [R, width] of a group, and cells for those that are missing."""
        device, page = ids.device, cfg.page_size
        rows = self._rows_of(group, device)
        held, used = self.held[rows], self.used[rows]
        wanted = torch.arange(ids.shape[1], device=device) < counts[:, None]
        pages = ids.long()
        same = (pages[:, :, None] == held[:, None, :]) & wanted[:, :, None]
        found = same.any(dim=2)
        # The oldest first; a page of this selection never makes room for another.
        order = used.masked_fill(same.any(dim=1), _NEVER).argsort(dim=1, stable=True)
        absent = wanted & ~found
        nth = (absent.cumsum(dim=1) - 1).clamp(min=0)
        column = torch.where(found, same.int().argmax(dim=2), order.gather(1, nth))
        column = column.where(wanted, self.capacity)
        held.scatter_(1, column, pages)
        used.scatter_(1, column, self._clock)
        held[:, self.capacity], used[:, self.capacity] = -1, _NEVER
        self.held[rows], self.used[rows] = held, used

        last, place = divmod(group.length - 1, page)
        here = held == last
        newest = here.int().argmax(dim=1).where(here.any(dim=1), self.capacity)
        token = pages[:, :, None] * page + torch.arange(page, device=device)
        old = (token < group.length - 1) & wanted[:, :, None]
        slot = token + group.offset
        if group.slots is not None:
            slot = group.slots[token.clamp(0, group.length - 1)]
        first = rows[:, None] * (self.capacity + 1)
        cells = first + column
        # Wider than it must be, so that kernels see few shapes of it.
        width = -(-group.length // (page * _COLUMNS)) * _COLUMNS
        table = torch.zeros(len(rows), width, dtype=torch.int32, device=device)
        # Columns that mean nothing write what the first one writes.
        table.scatter_(
            1, pages.where(wanted, pages[:, :1]), cells.where(wanted, cells[:, :1]).int()
        )
        return PageRequest(
            row_numbers=rows,
            cells=cells,
            missing=absent & old.any(dim=2),
            tokens=slot.where(old, -1),
            table=table,
            newest=first[:, 0] + newest,
            place=place,
        )

    def _rows_of(self, group: RowGroup, device: torch.device) -> Tensor:
        """Numbers of a group's rows; those whose tokens lie elsewhere than before hold nothing."""
        rows = group.rows
        rows = torch.arange(group.batch, device=device) if rows is None else rows.to(device)
        moved = [row for row in group.members if not _alike(self._layout.get(row), group)]
        if moved:
            self.held[torch.tensor(moved, device=device)] = -1
        for row in group.members:
            self._layout[row] = group.offset if group.slots is None else group.slots
        return rows

    def _clear(self, rows: int, device: torch.device) -> None:
        shape = rows, self.capacity + 1
        self.held = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.used = torch.zeros(shape, dtype=torch.int64, device=device)
        self.used[:, self.capacity] = _NEVER
        # Row -> slot of its first token, or the slots of all of them.
        self._layout: dict[int, int | Tensor] = {}
        self._clock = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle holds no pages: pools are filled anew."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.capacity = 0
        self.forget()


def _alike(layout: int | Tensor | None, group: RowGroup) -> bool:
    """Whether the tokens of a row before the new one lie where a layout has them."""
    if layout is None:
        return True  # the row holds nothing yet
    if group.slots is None:
        return isinstance(layout, int) and layout == group.offset
    if isinstance(layout, int):
        return False
    return torch.equal(layout, group.slots[:-1])
