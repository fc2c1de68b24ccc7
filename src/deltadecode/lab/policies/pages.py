"""Pages of left-padded rows: sums, choices and masks, without a loop over rows."""

from __future__ import annotations

import torch
from torch import Tensor

from deltadecode.lab.policies.base import View


def by_page(values: Tensor, view: View, page_size: int, fill: float) -> Tensor:
    """Lay values [B, ..., slots] out by page, [B, ..., N, P] with N = ⌈slots / P⌉.

    Pages count from a row's own first token; places that hold no token get ``fill``.
    """
    slots = values.shape[-1]
    if view.padded:
        shape = (slots,) if values.dim() == 1 else (-1, *[1] * (values.dim() - 2), slots)
        slot = torch.arange(slots, device=values.device)
        source = (slot + view.start[:, None]).clamp(max=slots - 1).view(shape)
        beyond = (slot >= view.lengths[:, None]).view(shape)
        values = values.gather(-1, source.expand(values.shape)).masked_fill(beyond, fill)
    pages = -(-slots // page_size)
    values = torch.nn.functional.pad(values, (0, pages * page_size - slots), value=fill)
    return values.view(*values.shape[:-1], pages, page_size)


def page_sums(weights: Tensor, view: View, page_size: int) -> Tensor:
    """Sum of the weights on each page; [B, ..., slots] to [B, ..., N]."""
    return by_page(weights, view, page_size, 0.0).sum(dim=-1)


def page_numbers(view: View, page_size: int) -> Tensor:
    """[B, slots] int64: the page of each slot; 0 in the padding."""
    if not view.padded:  # alike in all rows
        return (view.position[:1] // page_size).expand(view.position.shape)
    return (view.position // page_size).clamp(min=0)


def used_pages(view: View, page_size: int) -> Tensor:
    """[B] int64: pages of each row, N."""
    return (view.lengths + page_size - 1) // page_size


def largest(rank: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest values along the last dimension; ties go to the first ones."""
    # Not topk: which of several equal values it takes would hang on the padding.
    order = rank.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(rank, dtype=torch.bool).scatter_(-1, order, True)


def choose_pages(
    page_scores: Tensor, view: View, page_size: int, pages: int, recent: int = 0, sink: int = 0
) -> Tensor:
    """Mask of the pages with the largest scores, and of recent and sink pages (R3, R4).

    Scores are [B, ..., N]; ties go to the lower page. ``pages`` is how many to choose, at most.
    """
    count = page_scores.shape[-1]
    shape = (-1, *[1] * (page_scores.dim() - 2), count)
    page = torch.arange(count, device=page_scores.device)
    used = used_pages(view, page_size)[:, None]
    exists = (page < used).view(shape)
    if count <= pages:
        return exists.expand(page_scores.shape)
    forced = ((page >= used - recent) | (page < sink)).view(shape)
    ranked = page_scores.masked_fill(forced, torch.inf).masked_fill(~exists, -torch.inf)
    return largest(ranked, pages) & exists


def page_mask(page_ids: Tensor, count: int) -> Tensor:
    """Mask [B, count] of page ids [B, any] as :func:`deltadecode.ops.select_pages` gives them."""
    ids = page_ids.long()
    # One place more, for the -1 of unused places.
    mask = torch.zeros((len(ids), count + 1), dtype=torch.bool, device=ids.device)
    return mask.scatter_(1, ids.masked_fill(ids < 0, count), True)[:, :count]


def page_tokens(chosen: Tensor, view: View, page_size: int) -> Tensor:
    """Mask of the tokens on chosen pages; [B, ..., N] to [B, ..., slots]."""
    page = page_numbers(view, page_size)
    page = page.view(page.shape[0], *[1] * (chosen.dim() - 2), page.shape[1])
    return chosen.gather(-1, page.expand(*chosen.shape[:-1], -1))
