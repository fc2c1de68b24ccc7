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
        if grows or not follows or self._state.shape[1] != rows or self._state.device != device:
            self._clear(cfg, rows, device)
        self._length = length
        self._clock += 1

    def request(
        self, cfg: DeltaConfig, group: RowGroup, ids: Tensor, counts: Tensor
    ) -> PageRequest:
        """Find the selected pages [R, width] of a group, and cells for those that are missing."""
        page, width = cfg.page_size, ids.shape[1]
        rows = self._rows_of(group, ids.device)
        # Each operation here is a launch, of one Δ-layer after the other. So rows that are all of
        # them stay where they are.
        state = self._state if group.rows is None else self._state[:, rows]
        held, used = state[0], state[1]
        wanted = self._numbers[:width] < counts[:, None]
        pages = ids.long()
        same = (pages[:, :, None] == held[:, None, :]) & wanted[:, :, None]
        found, at = _first_true(same)
        # The spare cell, then the oldest; a page of this selection never makes room for another.
        order = torch.where(same.any(dim=1), self._never, used).argsort(dim=1, stable=True)
        absent = wanted ^ found
        column = torch.where(found, at, order.gather(1, absent.cumsum(dim=1) * absent))
        held.scatter_(1, column, pages)
        used.scatter_(1, column, self._clock)
        state[:, :, self.capacity].fill_(-1)
        if group.rows is not None:
            self._state[:, rows] = state

        last, place = divmod(group.length - 1, page)
        here, newest = _first_true(held == last)
        newest = newest.where(here, self._numbers[self.capacity])
        token = torch.add(self._numbers[:page], pages[:, :, None], alpha=page)
        old = (token < group.length - 1) & wanted[:, :, None]
        slot = token + group.offset if group.offset else token
        if group.slots is not None:
            slot = group.slots[token.clamp(0, group.length - 1)]
        first = self._firsts if group.rows is None else self._firsts[rows]
        cells = first[:, None] + column
        # Wider than it must be, so that kernels see few shapes of it.
        columns = -(-group.length // (page * _COLUMNS)) * _COLUMNS
        table = torch.zeros(len(rows), columns, dtype=torch.int32, device=ids.device)
        # Columns that mean nothing write what the first one writes.
        table.scatter_(
            1, pages.where(wanted, pages[:, :1]), cells.where(wanted, cells[:, :1]).int()
        )
        return PageRequest(
            row_numbers=rows,
            cells=cells,
            missing=absent & old[:, :, 0],  # of a page's tokens the first is the oldest
            tokens=slot.where(old, self._none),
            table=table,
            newest=first + newest,
            place=place,
        )

    def _rows_of(self, group: RowGroup, device: torch.device) -> Tensor:
        """Numbers of a group's rows; those whose tokens lie elsewhere than before hold nothing."""
        rows = group.rows
        rows = self._rows if rows is None else rows.to(device)
        moved = [row for row in group.members if not _alike(self._layout.get(row), group)]
        if moved:
            self._state[0, torch.tensor(moved, device=device)] = -1
        for row in group.members:
            self._layout[row] = group.offset if group.slots is None else group.slots
        return rows

    # Steps outside of inference mode must be able to write to what is made here, too.
    @torch.inference_mode(False)
    def _clear(self, cfg: DeltaConfig, rows: int, device: torch.device) -> None:
        cells = self.capacity + 1
        # Of each cell the page that it holds, -1 for none, and the step of its last use. Both are
        # -1 in the spare one.
        self._state = torch.full((2, rows, cells), -1, dtype=torch.int64, device=device)
        self._state[1, :, :-1] = 0
        # What steps count with: numbers of pages, tokens of a page and rows, and each row's cells.
        self._numbers = torch.arange(max(cells, cfg.page_size), device=device)
        self._rows = torch.arange(rows, device=device)
        self._firsts = self._rows * cells
        # A number of Python's would be sent to the device at every use.
        self._none, self._never = self._state.new_tensor([-1, _NEVER])
        # Row -> slot of its first token, or the slots of all of them.
        self._layout: dict[int, int | Tensor] = {}
        self._clock = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle holds no pages: pools are filled anew."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.capacity = 0
        self.forget()


def _first_true(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Whether any of the last dimension is true, and which, by one operation; none has more."""
    value, place = flags.view(torch.uint8).max(dim=-1)
    return value.view(torch.bool), place


def _alike(layout: int | Tensor | None, group: RowGroup) -> bool:
    """Whether the tokens of a row before the new one lie where a layout has them."""
    if layout is None:
        return True  # the row holds nothing yet
    if group.slots is None:
        return isinstance(layout, int) and layout == group.offset
    if isinstance(layout, int):
        return False
    return torch.equal(layout, group.slots[:-1])
