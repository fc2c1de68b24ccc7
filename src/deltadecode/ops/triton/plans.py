"""Launches of a decode step, worked out once for tensors of one kind.

A kind has everything but addresses and values. Whoever has a plan may launch it with any tensors of
its kind, without a check.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.ops.inputs import DecodeInputs
from deltadecode.ops.memory import HasAddress, Pointer
from deltadecode.ops.triton import attention, finish, selection
from deltadecode.ops.triton.direct import Launch
from deltadecode.ops.triton.launch import (
    MOST_OF_A_PIECE,
    SelectionShape,
    attention_shape,
    finish_shape,
    padded,
    page_list,
    selection_shape,
    tokens_in_tile,
)

# Block size where one block is the whole row: a cache that grows compiles nothing anew.
_WHOLE_ROW = 1 << 30
# Where in a plan's memory something may begin: at a multiple of so many numbers, 256 bytes.
_STEP = 64


class AttentionKind(NamedTuple):
    """What the launches of :func:`deltadecode.ops.decode_attention` follow from.

    ``queries`` are (B,) or (B, Q). Strides are of rows, tokens and heads of q; of blocks, slots and
    heads of the caches.
    """

    device: torch.device
    queries: tuple[int, ...]
    heads: int
    dim: int
    q_dtype: torch.dtype
    out_dtype: torch.dtype
    q_strides: tuple[int, int, int]
    cache_dtype: torch.dtype
    block_size: int
    kv_heads: int
    k_strides: tuple[int, int, int]
    v_strides: tuple[int, int, int]
    blocks: int
    table_row: int
    page_size: int
    ids_width: int
    ids_row: int
    sparse: bool
    scored: bool
    score_last: bool
    sinks_dtype: torch.dtype | None
    scale: float
    softcap: float | None
    v_scale: float
    # Of the scales of tokens, where there are any.
    scales_dtype: torch.dtype | None = None
    s_strides: tuple[int, int, int] = (0, 0, 0)

    @property
    def scored_queries(self) -> tuple[int, ...]:
        """Queries that have page scores: (B,) or (B, Q)."""
        return self.queries[:1] if self.score_last else self.queries

    @property
    def tokens(self) -> int:
        """Queries of a row, Q; 1 for (B,)."""
        return _tokens(self.queries)

    @property
    def reach(self) -> int:
        """Tokens that a row of the block table has room for."""
        return self.blocks * self.block_size

    @property
    def pages(self) -> int:
        """Page scores of a query."""
        return self.reach // self.page_size


def _tokens(queries: tuple[int, ...]) -> int:
    """Queries of a row, of (B,) or (B, Q)."""
    return queries[1] if len(queries) == 2 else 1


def attention_kind(inputs: DecodeInputs, q_dtype: torch.dtype | None = None) -> AttentionKind:
    """Kind of tensors whose last strides are 1; ``q_dtype`` where it is not that of the output."""
    q, k_cache, v_cache, table = inputs.q, inputs.k_cache, inputs.v_cache, inputs.block_table
    ids, sinks = inputs.page_ids, inputs.sinks
    *queries, heads, dim = q.shape
    scales = inputs.k_scales
    k_block, k_slot, k_head, _ = k_cache.stride()
    v_block, v_slot, v_head, _ = v_cache.stride()
    return AttentionKind(
        q.device, tuple(queries), heads, dim, q_dtype or q.dtype, q.dtype,
        (q.stride(0), q.stride(1) if q.dim() == 4 else 0, q.stride(-2)),
        k_cache.dtype, k_cache.shape[1], k_cache.shape[2],
        (k_block, k_slot, k_head), (v_block, v_slot, v_head),
        table.shape[1], table.stride(0), inputs.page_size,
        0 if ids is None else ids.shape[-1], table.stride(0) if ids is None else ids.stride(-2),
        ids is not None, inputs.return_page_scores, inputs.score_last and q.dim() == 4,
        None if sinks is None else sinks.dtype,
        float(inputs.scale * inputs.k_scale),
        None if inputs.softcap is None else float(inputs.softcap), float(inputs.v_scale),
        None if scales is None else scales.dtype,
        (0, 0, 0) if scales is None else (scales.stride(0), scales.stride(1), scales.stride(2)),
    )  # fmt: skip


class AttentionPlan:
    """Launches of the attention of one kind.

    Attributes
    ----------
    floats : int
        Float32 numbers of memory that a run needs.
    """

    def __init__(self, kind: AttentionKind) -> None:
        self.kind = kind
        heads, dim, scored = kind.heads, kind.dim, kind.scored
        group = heads // kind.kv_heads
        packed = 1 if kind.sparse else tokens_in_tile(kind.tokens, group)
        turns = -(-kind.tokens // packed)
        rows, reach = math.prod(kind.queries), kind.reach
        # Of selected pages, whatever the table has room for: equal bits wherever the pages lie.
        attended = kind.ids_width * kind.page_size if kind.sparse else reach
        dim_pad = max(16, triton.next_power_of_2(dim))
        tile, parts = attention_shape(
            dim_pad, kind.cache_dtype.itemsize, padded(kind.queries[0]) * turns * kind.kv_heads,
            attended, kind.sparse, group * packed, kind.device,
        )  # fmt: skip
        listed, step = page_list(kind.ids_width, tile.tokens, kind.page_size)
        common = {
            "HEADS": heads,
            "DIM": dim,
            "PAGE": kind.page_size,
            "SPLITS": parts,
            "SCORES": scored,
            "SINKS": kind.sinks_dtype is not None,
            "TOKENS": kind.tokens,
            "LAST": kind.score_last,
        }
        self._attend = Launch(
            attention.attend,
            (kind.kv_heads, parts, kind.queries[0] * turns),
            (*kind.q_strides, *kind.k_strides, *kind.v_strides, *kind.s_strides, kind.table_row,
             kind.ids_row, reach, kind.scale, kind.softcap or 1.0, kind.v_scale),
            dict(
                GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group * packed)),
                PACKED=packed,
                BLOCK=kind.block_size if kind.blocks > 1 else _WHOLE_ROW, TILE=tile.tokens,
                WIDTH=kind.ids_width, LISTED=listed, STEP=step, SPARSE=kind.sparse,
                PAIRS=_pairs(kind, dim_pad), SCALED=kind.scales_dtype is not None,
                SOFTCAP=kind.softcap is not None, OPERAND=_operand(kind), DIM_PAD=dim_pad,
                ALIKE=kind.k_strides[:2] == kind.v_strides[:2],
                num_warps=tile.warps, num_stages=tile.stages, **common,
            ),
        )  # fmt: skip
        self._finish = _finish_launch(kind, parts, dim_pad, common)
        # Numbers of the splits' outputs, of log-sum-exps and of logits.
        sizes = (
            rows * heads * parts * dim if parts > 1 else 0,
            rows * heads * parts if parts > 1 or scored else 0,
            math.prod(kind.scored_queries) * heads * reach if scored else 0,
        )
        self._places = []
        self._start: int | None = None
        self._pieces: list[Pointer] = []
        self.floats = 0
        for size in sizes:
            self._places.append((self.floats, size))
            self.floats += -(-size // _STEP) * _STEP

    def run(
        self,
        q: HasAddress,
        k_cache: HasAddress,
        v_cache: HasAddress,
        block_table: HasAddress,
        seq_lens: HasAddress,
        page_ids: HasAddress | None,
        page_counts: HasAddress | None,
        sinks: HasAddress | None,
        out: HasAddress,
        scores: HasAddress | None,
        memory: Tensor,
        k_scales: HasAddress | None = None,
        v_scales: HasAddress | None = None,
    ) -> None:
        """Fill ``out`` [..., Hq, D] and, of a kind with them, ``scores`` [..., pages]: contiguous.

        ``memory`` is of at least ``floats`` float32 numbers; nothing in it needs to be kept.
        """
        part, lse, logits = self._pieces_of(memory, q)
        sinks = q if sinks is None else sinks
        ids = block_table if page_ids is None else page_ids
        counts = seq_lens if page_counts is None else page_counts
        k_scales = q if k_scales is None else k_scales
        v_scales = q if v_scales is None else v_scales
        self._attend(
            q, k_cache, v_cache, k_scales, v_scales, block_table, seq_lens, ids, counts, sinks, out,
            part, lse, logits,
        )  # fmt: skip
        if self._finish is not None:
            scores = lse if scores is None else scores
            self._finish(part, lse, sinks, logits, seq_lens, out, scores)

    def compile(self) -> None:
        """Compile the kernels for aligned tensors, if they are not."""
        kind = self.kind
        part, lse, logits = (torch.float32 if size else kind.q_dtype for _, size in self._places)
        sinks = kind.q_dtype if kind.sinks_dtype is None else kind.sinks_dtype
        scales = kind.scales_dtype or kind.q_dtype
        self._attend.compile(
            kind.q_dtype, kind.cache_dtype, kind.cache_dtype, scales, scales,
            *[torch.int32] * 4, sinks, kind.out_dtype, part, lse, logits,
        )  # fmt: skip
        if self._finish is not None:
            self._finish.compile(
                part, lse, sinks, logits, torch.int32, kind.out_dtype, torch.float32
            )

    # A pointer that a launch never follows is of the type of q.
    def _pieces_of(self, memory: Tensor, q: HasAddress) -> Sequence[HasAddress]:
        if not memory.is_cuda:
            return [memory[first:][:size] if size else q for first, size in self._places]
        start = memory.data_ptr()
        if start != self._start:
            # The layers of a step share the memory, and where they begin in it.
            self._start, self._pieces = (
                start,
                [
                    Pointer(start + 4 * first, torch.float32 if size else self.kind.q_dtype)
                    for first, size in self._places
                ],
            )
        return self._pieces


def _operand(kind: AttentionKind) -> tl.dtype:
    """Type of the factors of matrix products: that of q, whatever the cache holds.

    Float16 for q and caches of float8: it holds every value of theirs, and one instruction makes
    two of them.
    """
    if kind.device.type != "cuda":
        return tl.float32  # the interpreter multiplies nothing smaller
    halves = {torch.float8_e4m3fn: tl.float16, torch.float16: tl.float16}
    return {**halves, torch.bfloat16: tl.bfloat16}.get(kind.q_dtype, tl.float32)


def _finish_launch(
    kind: AttentionKind, parts: int, dim_pad: int, common: dict[str, Any]
) -> Launch | None:
    """Launch that merges the parts of each row and sums up its page scores; None: neither."""
    if parts == 1 and not kind.scored:
        return None
    scored = math.prod(kind.scored_queries)
    page_pad = triton.next_power_of_2(kind.page_size)
    heads_pad = triton.next_power_of_2(kind.heads)
    scoring, at_once, warps, dims = finish_shape(
        heads_pad * page_pad, kind.pages, scored, parts, dim_pad, kind.device
    )
    merges = kind.heads * (dim_pad // dims) if parts > 1 else 0
    each = math.prod(kind.queries) // scored
    return Launch(
        finish.finish,
        (scored, (scoring if kind.scored else 0) + each * merges, 1),
        (kind.reach, kind.pages, kind.v_scale),
        dict(
            HEADS_PAD=heads_pad, PAGE_PAD=page_pad, PAGES=at_once,
            SPLITS_PAD=triton.next_power_of_2(parts), DIMS=dims, MERGES=merges,
            num_warps=warps, **common,
        ),
    )  # fmt: skip


def _pairs(kind: AttentionKind, dim_pad: int) -> int:
    """Pairs of numbers that values are read as; 0 for one by one.

    Engines that multiply float8 queries have caches at even addresses.
    """
    float8 = kind.q_dtype == kind.cache_dtype == torch.float8_e4m3fn
    even = kind.dim == dim_pad and not any(stride % 2 for stride in kind.v_strides)
    return dim_pad // 2 if float8 and even else 0


# A growing cache gives every step a plan of its own.
attention_plan = functools.lru_cache(maxsize=2048)(AttentionPlan)


class SelectionKind(NamedTuple):
    """What the launches of :func:`deltadecode.ops.select_pages` follow from."""

    # (B,) or (B, Q).
    queries: tuple[int, ...]
    width: int
    scores_dtype: torch.dtype
    scores_row: int
    page_size: int
    budget: int
    share_num: int
    recent: int
    sinks: int
    # The most pages that a row selects, and the columns that it has for them.
    most: int
    columns: int

    @property
    def shape(self) -> SelectionShape:
        """Compile-time shape of the launches, the same for all numbers of rows that pad alike."""
        rows = padded(max(1, self.queries[0])) * _tokens(self.queries)
        return selection_shape(rows, self.width, self.most)


def selection_kind(
    cfg: DeltaConfig, queries: Sequence[int], width: int, dtype: torch.dtype, scores_row: int
) -> SelectionKind:
    """Kind of [*queries, width] page scores."""
    return SelectionKind(
        tuple(queries), width, dtype, scores_row, cfg.page_size, cfg.budget_pages, cfg.share_num,
        cfg.recent_pages, cfg.sink_pages, cfg.pages_for(width), cfg.table_width(width),
    )  # fmt: skip


class SelectionPlan:
    """Launches of the selection of one kind."""

    def __init__(self, kind: SelectionKind) -> None:
        self.kind = kind
        self._rows = math.prod(kind.queries)
        shape = kind.shape
        # Pages that the pieces of a row find, if it goes in pieces.
        self._candidates = shape.pieces * kind.most if shape.pieces > 1 else 0
        constants: dict[str, Any] = dict(
            BUDGET=kind.budget, SHARE=kind.share_num, WIDTH=kind.columns,
            FILL=min(triton.next_power_of_2(kind.columns), MOST_OF_A_PIECE), PAGE=kind.page_size,
            LEAST=shape.least, SIZES=shape.sizes, PIECE=shape.piece,
            TOKENS=_tokens(kind.queries), num_warps=shape.warps,
        )  # fmt: skip
        row = self._candidates or kind.columns
        self._launches = [
            Launch(
                selection.select,
                (1 if last else shape.pieces, self._rows, 1),
                (kind.scores_row, row, kind.width, kind.recent, kind.sinks, last),
                constants,
            )
            for last in range(2 if self._candidates else 1)
        ]

    @property
    def in_pieces(self) -> bool:
        """Whether a long row is selected from in pieces."""
        return self._candidates > 0

    def run(self, scores: HasAddress, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Page ids and counts; see :func:`deltadecode.ops.select_pages`."""
        kind, device = self.kind, seq_lens.device
        page_ids = torch.empty((*kind.queries, kind.columns), dtype=torch.int32, device=device)
        page_counts = torch.empty(kind.queries, dtype=torch.int32, device=device)
        if self._rows == 0:
            return page_ids, page_counts
        candidates = page_ids
        if self._candidates:
            candidates = page_ids.new_empty((self._rows, self._candidates))
        for launch in self._launches:
            launch(scores, seq_lens, page_ids, page_counts, candidates)
        return page_ids, page_counts

    def compile(self) -> None:
        """Compile the kernel for aligned tensors, if it is not."""
        for launch in self._launches:
            launch.compile(self.kind.scores_dtype, *[torch.int32] * 4)


selection_plan = functools.lru_cache(maxsize=2048)(SelectionPlan)
