"""Triton backend: every kernel of a decode step on the GPU, captured by a CUDA graph as it is.

No host synchronisation, no allocation that depends on data, launch grids from shapes alone.
Contracts stand in :mod:`deltadecode.ops.operations`, the definition in
:mod:`deltadecode.ops.reference`. ``TRITON_INTERPRET=1`` runs the kernels on CPU tensors.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.ops.inputs import DecodeInputs
from deltadecode.ops.triton import attention, selection
from deltadecode.ops.triton.launch import (
    attention_shape,
    finish_shape,
    hardware,
    page_list,
    selection_shape,
    tokens_in_tile,
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
# Page ids that the selection writes at a time, where it need not rank them; pieces select no more.
_FILL = 4096


def unsupported(tensor: Tensor, k_cache: Tensor | None = None) -> str | None:
    """Both sides of what does not fit these kernels, in one line; None when they can.

    ``tensor`` is q [..., Hq, D], or page scores [B, pages] when there is no cache
    [blocks, block_size, Hkv, D].
    """
    if not tensor.is_cuda and not _INTERPRETED:
        return f"needs CUDA tensors, got {tensor.device}"
    if tensor.dtype not in _DTYPES:
        return f"takes bfloat16, float16 and float32, got {_name(tensor.dtype)}"
    float8 = k_cache is not None and k_cache.dtype == torch.float8_e4m3fn
    least = _FLOAT8_CAPABILITY if float8 else _LEAST_CAPABILITY
    capability = hardware(tensor.device).capability
    if capability < least:
        needs = f"GPUs of compute capability {least[0]}.{least[1]}{' for float8' if float8 else ''}"
        return f"needs {needs} or more, got {capability[0]}.{capability[1]}"
    if k_cache is None:
        return None
    heads, dim = tensor.shape[-2:]
    if dim > MOST_HEAD_DIM:
        return f"takes head sizes up to {MOST_HEAD_DIM}, got {dim}"
    group = heads // k_cache.shape[2]
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
    *shape, width = page_scores.shape
    most, columns = cfg.pages_for(width), cfg.table_width(width)
    page_ids = page_scores.new_empty((*shape, columns), dtype=torch.int32)
    page_counts = seq_lens.new_empty(shape)
    tokens = 1
    if len(shape) == 2:
        tokens, page_scores = shape[1], page_scores.flatten(0, 1)
    rows = page_scores.shape[0]
    if width and page_scores.stride(1) != 1:
        page_scores = page_scores.contiguous()
    if rows == 0:
        return page_ids, page_counts
    sizes = selection_shape(rows, width, most)
    launches, candidates = 1, page_ids
    if sizes.pieces > 1:
        launches, candidates = 2, page_ids.new_empty((rows, sizes.pieces * most))
    for last in range(launches):
        selection.select[(1 if last else sizes.pieces, rows)](
            page_scores, seq_lens, page_ids, page_counts, candidates,
            page_scores.stride(0), candidates.stride(0), width, cfg.recent_pages, cfg.sink_pages,
            last, BUDGET=cfg.budget_pages, SHARE=cfg.share_num,
            WIDTH=columns, FILL=min(triton.next_power_of_2(columns), _FILL), PAGE=cfg.page_size,
            LEAST=sizes.least, SIZES=sizes.sizes, PIECE=sizes.piece, TOKENS=tokens,
            num_warps=sizes.warps,
        )  # fmt: skip
    return page_ids, page_counts


def decode_attention(inputs: DecodeInputs) -> tuple[Tensor, Tensor | None]:
    """Attend with the new tokens of each row; see :func:`deltadecode.ops.decode_attention`."""
    q, k_cache, scored = inputs.q, inputs.k_cache, inputs.return_page_scores
    rows = q.shape[0]
    reach = inputs.block_table.shape[1] * k_cache.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scores = _floats(q, *q.shape[:-2], reach // inputs.page_size if scored else 0)
    if rows == 0 or reach == 0 or k_cache.shape[0] == 0:
        return out.zero_(), scores.zero_() if scored else None
    turns = -(-q.shape[:-1].numel() * reach * 4 // _LOGITS_BYTES) if scored else 1
    # Multiples of 4, so that the rows' lengths stay aligned as a kernel was compiled for.
    per_turn = -(-rows // (4 * turns)) * 4
    if rows <= per_turn:
        _launch(inputs, out, scores)
    else:
        for first in range(0, rows, per_turn):
            part = slice(first, first + per_turn)
            _launch(_rows_of(inputs, part), out[part], scores[part])
    return out, scores if scored else None


def _rows_of(inputs: DecodeInputs, part: slice) -> DecodeInputs:
    """Inputs of some rows, which have page scores and so no page ids."""
    return replace(
        inputs,
        q=inputs.q[part],
        block_table=inputs.block_table[part],
        seq_lens=inputs.seq_lens[part],
    )


def _launch(inputs: DecodeInputs, out: Tensor, scores: Tensor) -> None:
    """Fill ``out`` [..., Hq, D] and ``scores`` [..., pages]."""
    q, table, seq_lens = inputs.q, inputs.block_table, inputs.seq_lens
    q = q if q.stride(-1) == 1 else q.contiguous()
    table = table if table.stride(1) == 1 else table.contiguous()
    page_ids = None if inputs.page_ids is None else inputs.page_ids.contiguous()
    k_cache, v_cache, sinks = inputs.k_cache, inputs.v_cache, inputs.sinks
    page_size, softcap, v_scale = inputs.page_size, inputs.softcap, inputs.v_scale
    scored = inputs.return_page_scores
    heads, dim = q.shape[-2:]
    block_size, kv_heads = k_cache.shape[1:3]
    group = heads // kv_heads
    tokens, token_stride = (q.shape[1], q.stride(1)) if q.dim() == 4 else (1, 0)
    rows = q.shape[0] * tokens
    packed = 1 if inputs.page_ids is not None else tokens_in_tile(tokens, group)
    programs = q.shape[0] * -(-tokens // packed)
    reach = table.shape[1] * block_size
    pages = reach // page_size
    sparse = page_ids is not None
    attended = reach if page_ids is None else min(reach, page_ids.shape[-1] * page_size)
    dim_pad = max(16, triton.next_power_of_2(dim))
    shape, parts = attention_shape(
        dim_pad, k_cache.element_size(), programs * kv_heads, attended, sparse, q.device
    )
    listed, step = page_list(0 if page_ids is None else page_ids.shape[-1], shape.tokens, page_size)
    # A pointer that a launch never follows is that of q.
    part = _floats(q, rows, heads, parts, dim) if parts > 1 else q
    lse = _floats(q, rows, heads, parts) if parts > 1 or scored else q
    logits = _floats(q, rows, heads, reach) if scored else q
    ids = table if page_ids is None else page_ids
    counts = seq_lens if inputs.page_counts is None else inputs.page_counts
    common = {
        "HEADS": heads,
        "DIM": dim,
        "PAGE": page_size,
        "SPLITS": parts,
        "SCORES": scored,
        "SINKS": sinks is not None,
        "TOKENS": tokens,
    }
    attention.attend[(kv_heads, parts, programs)](
        q, k_cache, v_cache, table, seq_lens, ids, counts, q if sinks is None else sinks,
        out, part, lse, logits,
        q.stride(0), token_stride, q.stride(-2),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2), table.stride(0), ids.stride(-2),
        reach, inputs.scale * inputs.k_scale, softcap or 1.0, v_scale,
        GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group * packed)), PACKED=packed,
        BLOCK=block_size if table.shape[1] > 1 else _WHOLE_ROW, TILE=shape.tokens,
        WIDTH=ids.shape[-1] if sparse else 0, LISTED=listed, STEP=step,
        SPARSE=sparse, SOFTCAP=softcap is not None, OPERAND=_operand(q), DIM_PAD=dim_pad,
        num_warps=shape.warps, num_stages=shape.stages, **common,
    )  # fmt: skip
    if parts > 1 or scored:
        page_pad = triton.next_power_of_2(page_size)
        heads_pad = triton.next_power_of_2(heads)
        scoring, at_once, warps, dims = finish_shape(
            heads_pad * page_pad, pages, rows, parts, dim_pad, q.device
        )
        merges = heads * (dim_pad // dims) if parts > 1 else 0
        attention.finish[(rows, (scoring if scored else 0) + merges)](
            part, lse, q if sinks is None else sinks, logits, seq_lens, out, scores,
            reach, pages, v_scale,
            HEADS_PAD=heads_pad, PAGE_PAD=page_pad, PAGES=at_once,
            SPLITS_PAD=triton.next_power_of_2(parts), DIMS=dims, MERGES=merges,
            num_warps=warps, **common,
        )  # fmt: skip


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
