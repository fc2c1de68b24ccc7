"""Triton maker: every kernel of a decode step on the GPU, captured by a CUDA graph as it is.

No host synchronisation, no allocation that depends on data, launch grids from shapes alone.
Contracts stand in :mod:`deltadecode.ops`, the definition in :mod:`deltadecode.ops.reference`.
``TRITON_INTERPRET=1`` runs the kernels on CPU tensors.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.ops.triton import attention, selection
from deltadecode.ops.triton.launch import (
    attention_shape,
    finish_shape,
    hardware,
    selection_shape,
)

# Read when Triton defines the kernels, and not again.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})
# What Triton compiles for, and from where on it converts float8.
_LEAST_CAPABILITY, _FLOAT8_CAPABILITY = (8, 0), (8, 9)
MOST_HEAD_DIM = 256
MOST_GROUP = 32
# Block size where one block is the whole row: a cache that grows compiles nothing anew.
_WHOLE_ROW = 1 << 30
# Logits of a Δ-layer that may exist at a time. Engines capture batches of hundreds of rows, each as
# long as the model allows: those go some rows at a time.
_LOGITS_BYTES = 2**29


def unsupported(tensor: Tensor, k_cache: Tensor | None = None) -> str | None:
    """Why these kernels cannot compute with such tensors.

    Parameters
    ----------
    tensor : Tensor
        q [B, Hq, D], or page scores [B, pages] when there is no cache.
    k_cache : Tensor, optional
        [blocks, block_size, Hkv, D].

    Returns
    -------
    str or None
        Both sides of what does not fit, in one line; None when they can.
    """
    if not tensor.is_cuda and not _INTERPRETED:
        return f"needs CUDA tensors, got {tensor.device}"
    if tensor.dtype not in _DTYPES:
        return f"takes bfloat16, float16 and float32, got {_name(tensor.dtype)}"
    float8 = k_cache is not None and k_cache.dtype == torch.float8_e4m3fn
    least = _FLOAT8_CAPABILITY if float8 else _LEAST_CAPABILITY
    here = hardware(tensor.device).capability
    if here < least:
        needs = f"GPUs of compute capability {least[0]}.{least[1]}{' for float8' if float8 else ''}"
        return f"needs {needs} or more, got {here[0]}.{here[1]}"
    if k_cache is None:
        return None
    if tensor.shape[2] > MOST_HEAD_DIM:
        return f"takes head sizes up to {MOST_HEAD_DIM}, got {tensor.shape[2]}"
    group = tensor.shape[1] // k_cache.shape[2]
    if group > MOST_GROUP:
        return f"takes up to {MOST_GROUP} query heads per KV head, got {group}"
    return None


def _operand(q: Tensor) -> tl.dtype:
    """Type of the factors of matrix products: that of q, whatever the cache holds."""
    if not q.is_cuda:
        return tl.float32  # the interpreter multiplies nothing smaller
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(q.dtype, tl.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def select_pages(page_scores: Tensor, seq_lens: Tensor, cfg: DeltaConfig) -> tuple[Tensor, Tensor]:
    """Select pages (R3, R4); see :func:`deltadecode.ops.select_pages`."""
    rows, width = page_scores.shape
    if width and page_scores.stride(1) != 1:
        page_scores = page_scores.contiguous()
    budget = cfg.budget_pages
    page_ids = page_scores.new_empty((rows, budget), dtype=torch.int32)
    page_counts = torch.empty_like(seq_lens)
    if rows == 0:
        return page_ids, page_counts
    shape = selection_shape(rows, width, budget)
    found = page_ids.new_empty((rows, shape.pieces * budget)) if shape.pieces > 1 else page_ids
    for last in range(1 + (shape.pieces > 1)):
        selection.select[(1 if last else shape.pieces, rows)](
            page_scores, seq_lens, page_ids, page_counts, found,
            page_scores.stride(0), found.stride(0), width, cfg.recent_pages, cfg.sink_pages, last,
            BUDGET=budget, BUDGET_PAD=triton.next_power_of_2(budget), PAGE=cfg.page_size,
            LEAST=shape.least, SIZES=shape.sizes, PIECE=shape.piece, num_warps=shape.warps,
        )  # fmt: skip
    return page_ids, page_counts


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
    rows, heads, _ = q.shape
    reach = block_table.shape[1] * k_cache.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scores = _floats(q, rows, reach // page_size if return_page_scores else 0)
    if rows == 0 or reach == 0 or k_cache.shape[0] == 0:
        return (out.zero_(), scores) if return_page_scores else out.zero_()
    q = q if q.stride(2) == 1 else q.contiguous()
    table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    ids = None if page_ids is None else page_ids.contiguous()
    turns = -(-rows * heads * reach * 4 // _LOGITS_BYTES) if return_page_scores else 1
    # Multiples of 4, so that the rows' lengths stay aligned as a kernel was compiled for.
    per_turn = -(-rows // (4 * turns)) * 4
    for first in range(0, rows, per_turn):
        part = slice(first, first + per_turn)
        _launch(
            q[part], k_cache, v_cache, table[part], seq_lens[part],
            None if ids is None else ids[part], None if page_counts is None else page_counts[part],
            sinks, out[part], scores[part], scale * k_scale, page_size, softcap, v_scale,
            return_page_scores,
        )  # fmt: skip
    return (out, scores) if return_page_scores else out


def _launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    seq_lens: Tensor,
    page_ids: Tensor | None,
    page_counts: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    scores: Tensor,
    scale: float,
    page_size: int,
    softcap: float | None,
    v_scale: float,
    return_page_scores: bool,
) -> None:
    """Fill ``out`` and ``scores`` of some rows."""
    rows, heads, dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    reach = table.shape[1] * block_size
    pages = reach // page_size
    sparse = page_ids is not None
    attended = reach if page_ids is None else min(reach, page_ids.shape[1] * page_size)
    dim_pad = max(16, triton.next_power_of_2(dim))
    shape, parts = attention_shape(
        dim_pad, k_cache.element_size(), rows * kv_heads, attended, sparse, q.device
    )
    # A pointer that a launch never follows is that of q.
    part = _floats(q, rows, heads, parts, dim) if parts > 1 else q
    lse = _floats(q, rows, heads, parts) if parts > 1 or return_page_scores else q
    logits = _floats(q, rows, heads, reach) if return_page_scores else q
    ids = table if page_ids is None else page_ids
    counts = seq_lens if page_counts is None else page_counts
    group = heads // kv_heads
    common = {
        "HEADS": heads,
        "DIM": dim,
        "PAGE": page_size,
        "SPLITS": parts,
        "SCORES": return_page_scores,
        "SINKS": sinks is not None,
    }
    attention.attend[(kv_heads, parts, rows)](
        q, k_cache, v_cache, table, seq_lens, ids, counts, q if sinks is None else sinks,
        out, part, lse, logits,
        q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2), table.stride(0), ids.stride(0),
        reach, scale, softcap or 1.0, v_scale,
        GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)),
        BLOCK=block_size if table.shape[1] > 1 else _WHOLE_ROW, TILE=shape.tokens,
        BUDGET=ids.shape[1] if sparse else 0,
        BUDGET_PAD=triton.next_power_of_2(max(ids.shape[1], 16)) if sparse else 16,
        SPARSE=sparse, SOFTCAP=softcap is not None, OPERAND=_operand(q), DIM_PAD=dim_pad,
        num_warps=shape.warps, num_stages=shape.stages, **common,
    )  # fmt: skip
    if parts > 1 or return_page_scores:
        page_pad = triton.next_power_of_2(page_size)
        heads_pad = triton.next_power_of_2(heads)
        programs, at_once, warps, dims = finish_shape(
            heads_pad * page_pad, pages, rows, parts, dim_pad, q.device
        )
        merges = heads * (dim_pad // dims) if parts > 1 else 0
        attention.finish[(rows, (programs if return_page_scores else 0) + merges)](
            part, lse, q if sinks is None else sinks, logits, seq_lens, out, scores,
            reach, pages, v_scale,
            HEADS_PAD=heads_pad, PAGE_PAD=page_pad, PAGES=at_once,
            SPLITS_PAD=triton.next_power_of_2(parts), DIMS=dims, MERGES=merges,
            num_warps=warps, **common,
        )  # fmt: skip


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
