"""Where the tokens of each row lie in a batch's keys and values, at one decode step.

Pages count from a row's own first token (docs/semantics.md, R6). Left padding moves that token to
another slot in every row, and a padded conversation that goes on has padding in its middle too, so
rows are grouped by where their tokens start, and rows with gaps are packed first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from deltadecode.errors import ArgumentError

# A masked score is the lowest number of its type, at least this low in float16 and below elsewhere.
_MASKED = -1e4


@dataclass(eq=False)
class RowGroup:
    """Rows that hold their tokens in the same slots.

    Attributes
    ----------
    members : sequence of int
        R row numbers, ascending.
    batch : int
        Rows of the whole batch, B.
    offset : int
        Slot of the first token.
    length : int
        Tokens n of each row, the new one included.
    device : torch.device
        Where the keys are.
    slots : Tensor or None
        [length] int64 slots of the tokens when they have gaps (R is 1 then); None when they are
        ``offset``, ``offset + 1``, ...
    """

    members: Sequence[int]
    batch: int
    offset: int
    length: int
    device: torch.device
    slots: Tensor | None = None

    # Tensors are made when first used: steps within the budget need none.

    @cached_property
    def rows(self) -> Tensor | None:
        """[R] int64 row numbers; None for all rows of the batch, in order."""
        if len(self.members) == self.batch:
            return None
        return torch.tensor(self.members, device=self.device)

    @cached_property
    def block_table(self) -> Tensor:
        """[R, 1] int32: a block is a whole row."""
        if self.slots is not None:  # the row's copy, without the gaps, is the only block
            return torch.zeros((1, 1), dtype=torch.int32, device=self.device)
        if self.rows is not None:
            return self.rows.int()[:, None]
        return torch.arange(self.batch, dtype=torch.int32, device=self.device)[:, None]

    @cached_property
    def seq_lens(self) -> Tensor:
        """[R] int32, all equal to ``length``."""
        rows = len(self.members)
        return torch.full((rows,), self.length, dtype=torch.int32, device=self.device)

    def first_tokens(self, count: int) -> RowGroup:
        """The same rows with so many of their tokens."""
        slots = None if self.slots is None else self.slots[:count]
        return replace(self, length=count, slots=slots)

    def to(self, device: torch.device) -> RowGroup:
        """The same rows where another layer's keys are."""
        slots = None if self.slots is None else self.slots.to(device)
        return replace(self, device=device, slots=slots)

    def blocks(self, states: Tensor, page_size: int) -> Tensor:
        """The rows as blocks of whole pages.

        Parameters
        ----------
        states : Tensor
            [B, Hkv, slots, D], keys or values of the batch.
        page_size : int
            Tokens of a page, P.

        Returns
        -------
        Tensor
            [blocks, ⌈length / P⌉ · P, Hkv, D], for ``block_table``. A view where the memory behind
            the last token belongs to the same storage, else a copy.
        """
        if self.slots is not None:
            row = self.members[0]
            states = states[row : row + 1, :, self.slots]
        batch, heads, _, dim = states.shape
        tokens = -(-self.length // page_size) * page_size
        of_row, of_head, of_slot, of_dim = states.stride()
        start = states.storage_offset() + self.offset * of_slot
        last = start + (batch - 1) * of_row + (heads - 1) * of_head + (tokens - 1) * of_slot
        end = (last + dim) * states.element_size()
        if of_dim == 1 and end <= states.untyped_storage().nbytes():
            return states.as_strided(
                (batch, tokens, heads, dim), (of_row, of_slot, of_head, 1), start
            )
        blocks = states.new_zeros((batch, tokens, heads, dim))
        held = states.narrow(2, self.offset, self.length)
        blocks[:, : self.length].copy_(held.transpose(1, 2))
        return blocks

    def paged(self, key: Tensor, value: Tensor, page_size: int) -> tuple[Tensor, ...]:
        """The rows' cache as the operations take it: keys, values, block table and lengths."""
        keys, values = self.blocks(key, page_size), self.blocks(value, page_size)
        return keys, values, self.block_table, self.seq_lens


def group_rows(mask: Tensor | None, states: Tensor) -> list[RowGroup]:
    """Group the rows of a batch by where their tokens lie.

    Parameters
    ----------
    mask : Tensor or None
        [B or 1, heads or 1, 1, slots] attention mask of the new token: boolean, or additive with 0
        and very negative numbers. None when every slot holds a token.
    states : Tensor
        [B, Hkv, slots, D], keys of any layer.

    Raises
    ------
    ArgumentError
        When the mask has another shape, differs between heads, or holds finite biases.
    """
    batch, _, slots, _ = states.shape
    device = states.device
    if mask is None:
        return [RowGroup(range(batch), batch, 0, slots, device)]
    valid = _validity(mask, batch, slots)
    spans = torch.stack([valid.sum(dim=1), valid.int().argmax(dim=1)], dim=1).tolist()
    by_offset: dict[int, list[int]] = {}
    groups = []
    for row, (length, first) in enumerate(spans):
        if length == slots - first:
            by_offset.setdefault(first, []).append(row)
        else:
            gathered = valid[row].nonzero()[:, 0]
            groups.append(RowGroup([row], batch, 0, length, device, gathered))
    for offset, rows in by_offset.items():
        groups.append(RowGroup(rows, batch, offset, slots - offset, device))
    return groups


def _validity(mask: Tensor, batch: int, slots: int) -> Tensor:
    if mask.dim() != 4 or mask.shape[2] != 1 or mask.shape[3] != slots:
        raise ArgumentError(
            f"the attention mask of a decode step must be [rows, heads, 1, {slots}], "
            f"got {list(mask.shape)}"
        )
    if mask.dtype == torch.bool:
        valid = mask
    else:
        valid = mask == 0
        if not bool((valid | (mask <= _MASKED)).all()):
            raise ArgumentError(
                "an additive attention mask must hold 0 or very negative numbers at a decode "
                f"step, got {mask[~valid & (mask > _MASKED)][0].item():.4g}; position biases are "
                "not supported"
            )
    if valid.shape[1] > 1 and not bool((valid == valid[:, :1]).all()):
        raise ArgumentError(
            "the attention mask of a decode step must be the same for all heads, got one that "
            f"differs between its {valid.shape[1]} heads"
        )
    return valid[:, 0, 0].expand(batch, slots)
