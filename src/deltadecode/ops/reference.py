"""The definition of the operations, in plain PyTorch: one sequence at a time, no blocks.

Every other maker must agree with this one. It computes in float32, in float64 for float64 input.
Contracts and checks stand in :mod:`deltadecode.ops`; the rules R1..R9 in docs/semantics.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltadecode.config import DeltaConfig


def select_pages(page_scores: Tensor, seq_lens: Tensor, cfg: DeltaConfig) -> tuple[Tensor, Tensor]:
    """Select pages (R3, R4); see :func:`deltadecode.ops.select_pages`."""
    pages = page_scores.shape[1]
    budget = cfg.budget_pages
    used = (seq_lens.long() + cfg.page_size - 1) // cfg.page_size
    page = torch.arange(pages, device=page_scores.device)
    exists = page < used[:, None]
    forced = exists & ((page >= used[:, None] - cfg.recent_pages) | (page < cfg.sink_pages))

    # Two stable sorts: by score (ties keep the lower page first), then by how a page qualifies.
    # NaN compares with nothing, so it gets a class of its own below every number.
    nan = page_scores.isnan()
    order = page_scores.masked_fill(nan, 0).sort(dim=1, descending=True, stable=True).indices
    qualifies = exists.long() + (exists & ~nan).long()
    qualifies = qualifies.masked_fill(forced, 3).gather(1, order)
    order = order.gather(1, qualifies.sort(dim=1, descending=True, stable=True).indices)

    counts = used.clamp(max=budget)
    chosen = order[:, :budget]
    rank = torch.arange(chosen.shape[1], device=page_scores.device)
    # Unused places sort to the end, behind every page, and then become -1.
    chosen = chosen.masked_fill(rank >= counts[:, None], pages).sort(dim=1).values
    page_ids = page_scores.new_full((page_scores.shape[0], budget), -1, dtype=torch.int32)
    page_ids[:, : chosen.shape[1]] = chosen.masked_fill(chosen == pages, -1).int()
    return page_ids, counts.int()


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    page_size: int,
    page_ids: Tensor | None,
    page_counts: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None,
    k_scale: float,
    v_scale: float,
    return_page_scores: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend with one query token per sequence; see :func:`deltadecode.ops.decode_attention`."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    block_size = k_cache.shape[1]
    pages = block_table.shape[1] * block_size // page_size
    out = torch.zeros_like(q)
    page_scores = q.new_zeros((q.shape[0], pages), dtype=dtype)

    for row, length in enumerate(seq_lens.tolist()):
        if page_ids is None or page_counts is None or page_counts[row] < 0:
            tokens = torch.arange(length, device=q.device)
        else:
            selected = page_ids[row, : int(page_counts[row])].long()
            tokens = page_tokens(selected, page_size)
            tokens = tokens[(tokens >= 0) & (tokens < length)]
        if tokens.numel() == 0:
            continue
        block = block_table[row, tokens // block_size].long()
        k = k_cache[block, tokens % block_size].to(dtype) * k_scale
        v = v_cache[block, tokens % block_size].to(dtype) * v_scale
        alpha = attention_weights(q[row].to(dtype), k, scale, softcap, sinks)
        groups = alpha.view(v.shape[1], -1, v.shape[0])
        out[row] = torch.einsum("hgt,thd->hgd", groups, v).flatten(0, 1).to(out.dtype)
        if return_page_scores:
            page_scores[row].index_add_(0, tokens // page_size, alpha.amax(dim=0))
    return (out, page_scores) if return_page_scores else out


def attention_weights(
    q: Tensor, k: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Softmax weights of each query head over the given tokens (R2, R5, R7).

    Parameters
    ----------
    q : Tensor
        [Hq, D].
    k : Tensor
        [T, Hkv, D]; query head h reads key head h // (Hq / Hkv).
    scale : float
        Factor on q · k.
    softcap : float or None
        Logits become ``softcap * tanh(logit / softcap)`` after scaling.
    sinks : Tensor or None
        [Hq], one more logit per head in the denominator.

    Returns
    -------
    Tensor
        [Hq, T]; rows sum to 1, to less with sinks.
    """
    groups = q.reshape(k.shape[1], -1, k.shape[2])
    logits = torch.einsum("hgd,thd->hgt", groups, k).flatten(0, 1) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(logits.dtype)[:, None]], dim=1)
    return torch.softmax(logits, dim=1)[:, : k.shape[0]]


def page_tokens(page_ids: Tensor, page_size: int) -> Tensor:
    """Token numbers of the pages, [..., pages] -> [..., pages * page_size]."""
    offset = torch.arange(page_size, device=page_ids.device)
    return (page_ids[..., None] * page_size + offset).flatten(-2)
