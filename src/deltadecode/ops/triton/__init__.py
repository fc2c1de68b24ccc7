"""Triton backend: every kernel of a decode step on the GPU, captured by a CUDA graph as it is.

No host synchronisation, no allocation that depends on data, launch grids from shapes alone.
Contracts stand in :mod:`deltadecode.ops.operations`, the definition in
:mod:`deltadecode.ops.reference`. ``TRITON_INTERPRET=1`` runs the kernels on CPU tensors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import triton
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.ops.inputs import DecodeInputs
from deltadecode.ops.triton import index, wide
from deltadecode.ops.triton.decode import DecodePlan, compile_ahead
from deltadecode.ops.triton.launch import LONG_ROWS, hardware
from deltadecode.ops.triton.plans import (
    attention_kind,
    attention_plan,
    selection_kind,
    selection_plan,
)

# Read when Triton defines the kernels, and not again.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})
# What Triton compiles for, and from where on it converts float8.
_LEAST_CAPABILITY, _FLOAT8_CAPABILITY = (8, 0), (8, 9)
MOST_HEAD_DIM = 256
MOST_GROUP = 32
# Logits of a Δ-layer that may exist at a time. Engines capture batches of hundreds of rows, each as
# long as the model allows: those go some rows at a time.
_LOGITS_BYTES = 2**29
# Tiles of long rows whose budget is too large for pieces: thread blocks find it by digits of 11
# bits, which have so many values.
_WIDE_TILE, _BINS = 4096, 2048
# Tokens that a thread block scores for an index.
_SCORED = 128


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def select_pages(page_scores: Tensor, seq_lens: Tensor, cfg: DeltaConfig) -> tuple[Tensor, Tensor]:
    """Select pages (R3, R4); see :func:`deltadecode.ops.select_pages`."""
    *queries, width = page_scores.shape
    if len(queries) == 2:
        page_scores = page_scores.flatten(0, 1)
    if width and page_scores.stride(1) != 1:
        page_scores = page_scores.contiguous()
    kind = selection_kind(cfg, queries, width, page_scores.dtype, page_scores.stride(0))
    plan = selection_plan(kind)
    # With every page in the budget there is nothing to look for.
    is_long = width > max(LONG_ROWS, cfg.budget_pages) and not cfg.share_num
    if len(queries) == 1 and is_long and not plan.in_pieces:
        return _select_wide(page_scores, seq_lens, cfg)
    return plan.run(page_scores, seq_lens)


def compile_selections(cfg: DeltaConfig, rows: Iterable[int], pages: int) -> None:
    """Compile selections; see :func:`deltadecode.ops.dispatch.compile_selections`."""
    shapes = set()
    for count in rows:
        kind = selection_kind(cfg, (count,), pages, torch.float32, pages)
        if kind.shape not in shapes:  # others are the same kernels
            shapes.add(kind.shape)
            selection_plan(kind).compile()


def _select_wide(scores: Tensor, seq_lens: Tensor, cfg: DeltaConfig) -> tuple[Tensor, Tensor]:
    """Select pages of rows that are too long for a thread block each, by digits."""
    rows, width = scores.shape
    pieces, budget = -(-width // _WIDE_TILE), cfg.budget_pages
    ids = torch.empty((rows, budget), dtype=torch.int32, device=scores.device)
    selected, tallies = ids.new_empty(rows), ids.new_empty((rows, pieces, 2))
    if rows == 0:
        return ids, selected
    counts = ids.new_zeros((rows, 3, _BINS))
    numbers = scores.stride(0), width, cfg.recent_pages, cfg.sink_pages
    sizes = {"BUDGET": budget, "PAGE": cfg.page_size, "TILE": _WIDE_TILE, "BINS": _BINS}
    grid = (pieces, rows)
    for digit in range(3):
        wide.count[grid](scores, seq_lens, counts, *numbers, **sizes, DIGIT=digit)
    wide.tally[grid](scores, seq_lens, counts, tallies, *numbers, **sizes)
    wide.place[grid](
        scores, seq_lens, counts, tallies, ids, selected, *numbers, **sizes,
        PIECES=triton.next_power_of_2(pieces),
    )  # fmt: skip
    return ids, selected


def decode_attention(inputs: DecodeInputs) -> tuple[Tensor, Tensor | None]:
    """Attend with the new tokens of each row; see :func:`deltadecode.ops.decode_attention`."""
    q, k_cache, scored = inputs.q, inputs.k_cache, inputs.return_page_scores
    rows = q.shape[0]
    reach = inputs.block_table.shape[1] * k_cache.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scores = _floats(q, *inputs.scored_queries, reach // inputs.page_size if scored else 0)
    if rows == 0 or reach == 0 or k_cache.shape[0] == 0:
        return out.zero_(), scores.zero_() if scored else None
    per_turn = _rows_at_once(inputs)
    if rows <= per_turn:
        _run(inputs, out, scores)
    else:
        for first in range(0, rows, per_turn):
            part = slice(first, first + per_turn)
            _run(_rows_of(inputs, part), out[part], scores[part])
    return out, scores if scored else None


def index_scores(
    q: Tensor, keys: Tensor, block_table: Tensor, seq_lens: Tensor, scale: float
) -> Tensor:
    """Score every token; see :func:`deltadecode.ops.index_scores`."""
    rows, dim = q.shape
    width = block_table.shape[1] * keys.shape[1]
    out = _floats(q, rows, width)
    if rows == 0 or width == 0:
        return out
    q = q if q.stride(1) == 1 else q.contiguous()
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    index.score[(-(-width // _SCORED), rows)](
        q, keys, block_table, seq_lens, out, q.stride(0), keys.stride(0), keys.stride(1),
        block_table.stride(0), width, float(scale), DIM=dim,
        DIM_PAD=max(16, triton.next_power_of_2(dim)), BLOCK=keys.shape[1], TILE=_SCORED,
    )  # fmt: skip
    return out


def plan_decode(
    inputs: DecodeInputs,
    cfg: DeltaConfig | None,
    compile_rows: int,
    q_dtype: torch.dtype | None,
    over_all_ranks: Callable[[Tensor], Tensor] | None,
) -> DecodePlan | None:
    """Plan of one layer; see :func:`deltadecode.ops.plan_decode`."""
    rows, last_strides = inputs.q.shape[0], (inputs.q.stride(-1), inputs.block_table.stride(1))
    reach = inputs.block_table.shape[1] * inputs.k_cache.shape[1]
    if rows == 0 or reach == 0 or inputs.k_cache.shape[0] == 0:
        return None
    if last_strides != (1, 1) or rows > _rows_at_once(inputs):
        return None
    if over_all_ranks is not None:
        # Pages of one token: a maximum over heads comes before the sum over a page (R2).
        inputs = replace(inputs, page_size=1)
    kind = attention_kind(inputs, q_dtype)
    if compile_rows and kind.device.type == "cuda":
        compile_ahead(kind, cfg, compile_rows)
    return DecodePlan(kind, cfg, over_all_ranks)


def _rows_at_once(inputs: DecodeInputs) -> int:
    """Rows whose logits may exist at a time."""
    rows = inputs.q.shape[0]
    if not inputs.return_page_scores:
        return rows
    reach = inputs.block_table.shape[1] * inputs.k_cache.shape[1]
    logits = math.prod(inputs.scored_queries) * inputs.q.shape[-2] * reach
    turns = -(-logits * 4 // _LOGITS_BYTES)
    # Multiples of 4, so that the rows' lengths stay aligned as a kernel was compiled for.
    return -(-rows // (4 * turns)) * 4


def _rows_of(inputs: DecodeInputs, part: slice) -> DecodeInputs:
    """Inputs of some rows, which have page scores and so no page ids."""
    return replace(
        inputs,
        q=inputs.q[part],
        block_table=inputs.block_table[part],
        seq_lens=inputs.seq_lens[part],
    )


def _run(inputs: DecodeInputs, out: Tensor, scores: Tensor) -> None:
    """Fill ``out`` [..., Hq, D] and ``scores`` [..., pages]."""
    q, table, page_ids = inputs.q, inputs.block_table, inputs.page_ids
    inputs = replace(
        inputs,
        q=q if q.stride(-1) == 1 else q.contiguous(),
        block_table=table if table.stride(1) == 1 else table.contiguous(),
        page_ids=None if page_ids is None else page_ids.contiguous(),
    )
    plan = attention_plan(attention_kind(inputs))
    plan.run(
        inputs.q, inputs.k_cache, inputs.v_cache, inputs.block_table, inputs.seq_lens,
        inputs.page_ids, inputs.page_counts, inputs.sinks, out, scores, _floats(q, plan.floats),
        inputs.k_scales, inputs.v_scales,
    )  # fmt: skip


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
