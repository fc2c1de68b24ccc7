"""Exact top-k of page scores without a sort: the k-th largest is found by four digits of 8 bits."""

from __future__ import annotations

import triton
import triton.language as tl

_HIGHEST = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _keys(scores_ptr, page, pages, recent_from, sinks):
    """Unsigned keys in the order of R4, and which pages exist.

    NaN is the lowest key and a forced page the highest; no number has either.
    """
    exists = page < pages
    score = tl.load(scores_ptr + page, mask=exists, other=0.0).to(tl.float32)
    # -0.0 equals 0.0, but its bits do not.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = key.to(tl.uint32, bitcast=True) ^ 0x80000000
    key = tl.where(score == score, key, 0)
    forced = (page >= recent_from) | (page < sinks)
    return tl.where(forced, _HIGHEST, key), exists


@triton.jit
def _digits(key, exists, prefix, shift, FIRST: tl.constexpr):
    """How many keys with the digits found so far have which next digit, [256].

    Other keys count as digit 0, which is what is left when no other digit has enough keys.
    """
    digit = (key >> shift) & 0xFF
    if not FIRST:
        exists = exists & ((key >> shift) >> 8 == prefix)
    return tl.histogram(tl.where(exists, digit, 0).to(tl.int32), 256)


@triton.jit
def _place(key, exists, page, threshold, ties, above_before, equal_before, ids_ptr):
    """Write the selected pages of a chunk at their ranks; returns the counts with it included."""
    above = exists & (key > threshold)
    equal = exists & (key == threshold)
    # Two counts in one scan; a chunk has fewer than 2^15 pages.
    seen = tl.cumsum((above.to(tl.int32) << 16) + equal.to(tl.int32), 0)
    above_seen = above_before + (seen >> 16)
    equal_seen = equal_before + (seen & 0xFFFF)
    chosen = above | (equal & (equal_seen <= ties))
    rank = above_seen + tl.minimum(equal_seen, ties) - 1
    tl.store(ids_ptr + rank, page, mask=chosen)
    return (
        above_before + tl.sum(above.to(tl.int32), 0),
        equal_before + tl.sum(equal.to(tl.int32), 0),
    )


@triton.jit
def select(
    scores_ptr, lens_ptr, ids_ptr, counts_ptr, scores_row, width, recent, sinks,
    BUDGET: tl.constexpr, BUDGET_PAD: tl.constexpr, PAGE: tl.constexpr, CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
):  # fmt: skip
    """Select the pages of one row (R3, R4); grid (B,)."""
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * scores_row
    ids_ptr += row * BUDGET
    pages = tl.minimum(tl.cdiv(tl.load(lens_ptr + row), PAGE), width)
    count = tl.minimum(pages, BUDGET)
    tl.store(counts_ptr + row, count)
    slot = tl.arange(0, BUDGET_PAD)
    if pages <= BUDGET:
        tl.store(ids_ptr + slot, tl.where(slot < pages, slot, -1), mask=slot < BUDGET)
    else:
        offset = tl.arange(0, CHUNK)
        recent_from = pages - recent
        if ONE_CHUNK:
            key, exists = _keys(scores_ptr, offset, pages, recent_from, sinks)
        # Of the keys with this prefix, the wanted-th largest is sought.
        prefix = tl.zeros([], tl.uint32)
        wanted = tl.full([], BUDGET, tl.int32)
        for round in tl.static_range(4):
            shift = 24 - 8 * round
            if ONE_CHUNK:
                counts = _digits(key, exists, prefix, shift, round == 0)
            else:
                counts = tl.zeros([256], tl.int32)
                for start in range(0, pages, CHUNK):
                    keys, there = _keys(scores_ptr, start + offset, pages, recent_from, sinks)
                    counts += _digits(keys, there, prefix, shift, round == 0)
            reaching = tl.cumsum(counts, 0, reverse=True)
            enough = (reaching >= wanted) & (tl.arange(0, 256) > 0)
            digit = tl.sum(enough.to(tl.int32), 0)
            wanted -= tl.max(tl.where(reaching < wanted, reaching, 0), 0)
            prefix = prefix * 256 + digit.to(tl.uint32)
        if ONE_CHUNK:
            _place(key, exists, offset, prefix, wanted, 0, 0, ids_ptr)
        else:
            above_before = tl.zeros([], tl.int32)
            equal_before = tl.zeros([], tl.int32)
            for start in range(0, pages, CHUNK):
                page = start + offset
                keys, there = _keys(scores_ptr, page, pages, recent_from, sinks)
                above_before, equal_before = _place(
                    keys, there, page, prefix, wanted, above_before, equal_before, ids_ptr
                )
