"""The definition of the operations, in plain PyTorch: one sequence at a time, no blocks.

Every other backend must agree with this one. It computes in float32, in float64 for float64 input.
Contracts stand in :mod:`deltadecode.ops.operations`; the rules R1..R10 in docs/semantics.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.ops.inputs import DecodeInputs


def select_pages(page_scores: Tensor, seq_lens: Tensor, cfg: DeltaConfig) -> tuple[Tensor, Tensor]:
    """Select pages (R3, R4); see :func:`deltadecode.ops.select_pages`."""
    pages, width = page_scores.shape[1], cfg.table_width(page_scores.shape[1])
    used = (seq_lens.long() + cfg.page_size - 1) // cfg.page_size
    counts = used.new_tensor([min(row, cfg.pages_for(row)) for row in used.tolist()])
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

    chosen = order[:, :width]
    rank = torch.arange(chosen.shape[1], device=page_scores.device)
    # Unused places sort to the end, behind every page, and then become -1.
    chosen = chosen.masked_fill(rank >= counts[:, None], pages).sort(dim=1).values
    page_ids = page_scores.new_full((page_scores.shape[0], width), -1, dtype=torch.int32)
    page_ids[:, : chosen.shape[1]] = chosen.masked_fill(chosen == pages, -1).int()
    return page_ids, counts.int()


def decode_attention(inputs: DecodeInputs) -> tuple[Tensor, Tensor | None]:
    """Attend with one query token per sequence; see :func:`deltadecode.ops.decode_attention`."""
    q, block_table, page_size = inputs.q, inputs.block_table, inputs.page_size
    page_ids, page_counts = inputs.page_ids, inputs.page_counts
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    block_size = inputs.k_cache.shape[1]
    pages = block_table.shape[1] * block_size // page_size
    out = torch.zeros_like(q)
    page_scores = q.new_zeros((q.shape[0], pages), dtype=dtype)

    for row, length in enumerate(inputs.seq_lens.tolist()):
        if page_ids is None or page_counts is None or page_counts[row] < 0:
            tokens = torch.arange(length, device=q.device)
        else:
            selected = page_ids[row, : int(page_counts[row])].long()
            tokens = page_tokens(selected, page_size)
            tokens = tokens[(tokens >= 0) & (tokens < length)]
        if tokens.numel() == 0:
            continue
        block = block_table[row, tokens // block_size].long()
        place = block, tokens % block_size
        k = inputs.k_cache[place].to(dtype) * inputs.k_scale
        v = inputs.v_cache[place].to(dtype) * inputs.v_scale
        if inputs.k_scales is not None and inputs.v_scales is not None:
            k = k * inputs.k_scales[place].to(dtype)[..., None]
            v = v * inputs.v_scales[place].to(dtype)[..., None]
        alpha = attention_weights(q[row].to(dtype), k, inputs.scale, inputs.softcap, inputs.sinks)
        groups = alpha.view(v.shape[1], -1, v.shape[0])
        out[row] = torch.einsum("hgt,thd->hgd", groups, v).flatten(0, 1).to(out.dtype)
        if inputs.return_page_scores:
            page_scores[row].index_add_(0, tokens // page_size, alpha.amax(dim=0))
    return out, page_scores if inputs.return_page_scores else None


def index_scores(
    q: Tensor, keys: Tensor, block_table: Tensor, seq_lens: Tensor, scale: float
) -> Tensor:
    """Score every token; see :func:`deltadecode.ops.index_scores`."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    block_size = keys.shape[1]
    out = q.new_zeros((q.shape[0], block_table.shape[1] * block_size), dtype=dtype)
    for row, length in enumerate(seq_lens.tolist()):
        tokens = torch.arange(length, device=q.device)
        k = keys[block_table[row, tokens // block_size].long(), tokens % block_size]
        out[row, :length] = k.to(dtype) @ q[row].to(dtype) * scale
    return out


def attention_weights(
    q: Tensor, k: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Softmax weights [Hq, T] of q [Hq, D] over keys [T, Hkv, D] (R2, R5, R7).

    Query head h reads key head h // (Hq / Hkv). Rows sum to 1, to less with sinks.
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
