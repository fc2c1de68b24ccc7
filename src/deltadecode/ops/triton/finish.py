"""What finishes split-KV attention: the merge of the splits, and page scores from its logits."""

from __future__ import annotations

import triton
import triton.language as tl

from deltadecode.ops.triton.attention import LOG2E


@triton.jit
def _whole_lse(lse, sink):
    """Log-sum-exp over splits ``lse`` [heads, SPLITS_PAD], sinks ``sink`` [heads] included (R7)."""
    highest = tl.maximum(tl.max(lse, 1), sink)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2(lse - base[:, None]), 1) + tl.exp2(sink - base)
    return base + tl.log2(total)


@triton.jit
def _load_lse(lse_ptr, sinks_ptr, row, head, HEADS: tl.constexpr, SPLITS: tl.constexpr,
              SPLITS_PAD: tl.constexpr, SINKS: tl.constexpr):  # fmt: skip
    """Log-sum-exps [heads, SPLITS_PAD] of each split, and whole ones [heads], of some heads."""
    split = tl.arange(0, SPLITS_PAD)
    real = head < HEADS
    lse = tl.load(
        lse_ptr + (row * HEADS + head)[:, None] * SPLITS + split[None, :],
        mask=real[:, None] & (split < SPLITS)[None, :],
        other=float("-inf"),
    )
    if SINKS:
        sink = tl.load(sinks_ptr + head, mask=real, other=0.0).to(tl.float32) * LOG2E
    else:
        sink = tl.full(head.shape, float("-inf"), tl.float32)
    return lse, _whole_lse(lse, sink)


@triton.jit
def _merge(
    part_ptr, lse_ptr, sinks_ptr, out_ptr, row, head, first, v_scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Output of one head from its splits, DIMS of its numbers from ``first`` on."""
    split = tl.arange(0, SPLITS_PAD)
    dim = first + tl.arange(0, DIMS)
    heads = head + tl.arange(0, 1)
    lse, whole = _load_lse(lse_ptr, sinks_ptr, row, heads, HEADS, SPLITS, SPLITS_PAD, SINKS)
    # A split without tokens has written nothing. NaN is not written off as one.
    written = (lse != float("-inf")) & (split < SPLITS)[None, :]
    weight = tl.where(written, tl.exp2(lse - whole[:, None]), 0.0)
    weight = tl.reshape(weight, [SPLITS_PAD])
    written = tl.reshape(written, [SPLITS_PAD])
    part = tl.load(
        part_ptr + ((row * HEADS + head) * SPLITS + split)[:, None] * DIM + dim[None, :],
        mask=written[:, None] & (dim < DIM)[None, :],
        other=0.0,
    )
    merged = tl.sum(weight[:, None] * part, 0) * v_scale
    at = (row * HEADS + head) * DIM + dim
    tl.store(out_ptr + at, merged.to(out_ptr.dtype.element_ty), mask=dim < DIM)


@triton.jit
def finish(
    part_ptr, lse_ptr, sinks_ptr, logits_ptr, lens_ptr, out_ptr, scores_ptr, width, pages, v_scale,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    MERGES: tl.constexpr, PAGE: tl.constexpr, PAGE_PAD: tl.constexpr, PAGES: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr, SCORES: tl.constexpr, SINKS: tl.constexpr,
    TOKENS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Score pages, PAGES at a time (R2), or merge splits; grid (scored queries, scoring + merges).

    Of a row's TOKENS queries all are scored, or with LAST the last one, whose programs merge for
    the others, too.

    The last programs of a row merge DIMS numbers of one head each, MERGES for a query. They come
    after all others, since what they do is the least.
    """
    scored = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1)
    queries: tl.constexpr = TOKENS if LAST else 1
    scoring = tl.num_programs(1) - queries * MERGES
    if first >= scoring:
        if MERGES > 0:
            row = scored * queries + (first - scoring) // MERGES
            merge = (first - scoring) % MERGES
            parts: tl.constexpr = MERGES // HEADS
            _merge(
                part_ptr, lse_ptr, sinks_ptr, out_ptr, row, merge // parts, merge % parts * DIMS,
                v_scale, HEADS, DIM, DIMS, SPLITS, SPLITS_PAD, SINKS,
            )  # fmt: skip
    elif SCORES:
        row = scored * queries + queries - 1
        n = tl.load(lens_ptr + row // TOKENS) - (TOKENS - 1) + row % TOKENS
        heads = tl.arange(0, HEADS_PAD)
        _, whole = _load_lse(lse_ptr, sinks_ptr, row, heads, HEADS, SPLITS, SPLITS_PAD, SINKS)
        # A head that is none has no weight; -inf - -inf would be NaN.
        whole = tl.where(heads < HEADS, whole, 0.0)
        logits_ptr += scored * HEADS * width
        # What is left of the table beyond a row's own pages is zeros: not worth a loop of its own.
        for start in range(first * PAGES, pages, scoring * PAGES):
            score = tl.zeros([PAGES], tl.float32)
            if start * PAGE < n:
                score = _scores_of(
                    logits_ptr, whole, start, n, width, HEADS, HEADS_PAD, PAGE, PAGE_PAD, PAGES
                )
            page = start + tl.arange(0, PAGES)
            tl.store(scores_ptr + scored * pages + page, score, mask=page < pages)


@triton.jit
def _scores_of(
    logits_ptr, whole, start, n, width, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr,
    PAGE: tl.constexpr, PAGE_PAD: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """S_u of PAGES pages of a row, from page ``start`` on."""
    place = tl.arange(0, PAGES * PAGE_PAD)
    token = (start + place // PAGE_PAD) * PAGE + place % PAGE_PAD
    valid = (place % PAGE_PAD < PAGE) & (token < n)
    heads = tl.arange(0, HEADS_PAD)
    # All heads at once: nothing waits for anything but its own load.
    logits = tl.load(
        logits_ptr + heads.to(tl.int64)[:, None] * width + token[None, :],
        mask=(heads < HEADS)[:, None] & valid[None, :],
        other=float("-inf"),
    )
    best = highest(logits - whole[:, None])
    # exp2 is monotonic: one for the largest instead of one per head.
    weight = tl.where(valid, tl.exp2(best), 0.0)
    return tl.sum(tl.reshape(weight, [PAGES, PAGE_PAD]), 1)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def highest(numbers):
    """Largest over the first dimension; NaN if any is."""
    return tl.reduce(numbers, 0, _larger)
