"""Exact top-k of page scores without a sort: the k-th largest is found two bits at a time.

The search starts near the largest score and ends as soon as exactly k scores reach its range: few
of the 32 bits are ever asked for. On an H200, histograms of 8 bits were slower.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltadecode.config import SHARE_DEN

_SHARE_DEN = tl.constexpr(SHARE_DEN)
_HIGHEST = tl.constexpr(0xFFFFFFFF)
# How far below the largest key the search looks first: 1/32 and 1/2 of a power of two, and eight.
# Powers of 4, since every further question quarters the range.
_NEAR, _MIDDLE, _FAR = tl.constexpr(1 << 18), tl.constexpr(1 << 22), tl.constexpr(1 << 26)


@triton.jit
def score_keys(scores_ptr, page, exists, recent_from, sinks):
    """Unsigned keys in the order of R4.

    NaN is the lowest key and a forced page the highest; no number has either.
    """
    score = tl.load(scores_ptr + page, mask=exists, other=0.0).to(tl.float32)
    # -0.0 equals 0.0, but its bits do not.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = key.to(tl.uint32, bitcast=True) ^ 0x80000000
    key = tl.where(score == score, key, 0)
    forced = (page >= recent_from) | (page < sinks)
    return tl.where(forced, _HIGHEST, key)


@triton.jit
def _count(key, exists, first, second, third, BITS: tl.constexpr):
    """How many keys reach each of three ascending numbers, as fields of BITS bits of one sum."""
    one = exists.to(tl.int64 if BITS > 10 else tl.int32)
    fields = tl.where(key >= first, one, 0)
    fields += tl.where(key >= second, one << BITS, 0)
    fields += tl.where(key >= third, one << (2 * BITS), 0)
    return tl.sum(fields, 0)


@triton.jit
def _narrow(fields, low, first, second, third, above, reaching, budget, BITS: tl.constexpr):
    """Range of the budget-th largest key, of the four that three numbers make of one.

    Returns its lower end, how many keys lie above it, how many reach it, and its number.
    """
    mask: tl.constexpr = (1 << BITS) - 1
    reach_1 = (fields & mask).to(tl.int32)
    reach_2 = ((fields >> BITS) & mask).to(tl.int32)
    reach_3 = ((fields >> (2 * BITS)) & mask).to(tl.int32)
    number = (reach_1 >= budget).to(tl.int32) + (reach_2 >= budget).to(tl.int32)
    number += (reach_3 >= budget).to(tl.int32)
    low = _one_of(number, low, first, second, third)
    above = _one_of(number, reach_1, reach_2, reach_3, above)
    reaching = _one_of(number, reaching, reach_1, reach_2, reach_3)
    return low, above, reaching, number


@triton.jit
def _one_of(number, zeroth, first, second, third):
    return tl.where(
        number == 0, zeroth, tl.where(number == 1, first, tl.where(number == 2, second, third))
    )


@triton.jit
def _start(highest):
    """Numbers that the search asks for first, given the largest key that is not forced."""
    end = highest + 1
    far = tl.where(end > _FAR, end - _FAR, 0)
    middle = tl.where(end > _MIDDLE, end - _MIDDLE, 0)
    return far, middle, tl.where(end > _NEAR, end - _NEAR, 0)


@triton.jit
def _first_step(number, reaching, budget):
    """Quarter of the range that the first question has found; 0 where it holds the budget."""
    step = _one_of(number, 1 << 30, _FAR >> 2, _MIDDLE >> 2, _NEAR >> 2).to(tl.uint32)
    return tl.where(reaching == budget, 0, step)


@triton.jit
def _ties(low, above, reaching, budget):
    """Threshold above which every key is selected, and how many equal to it are, the first ones."""
    whole = reaching == budget  # low is above 0: more keys than the budget reach 0
    return tl.where(whole, low - 1, low), tl.where(whole, 0, budget - above)


@triton.jit
def place_chosen(key, exists, page, threshold, ties, above_before, equal_before, ids_ptr):
    """Write the selected pages of a chunk at their ranks; returns the counts with it included."""
    above = exists & (key > threshold)
    equal = exists & (key == threshold)
    # Two counts in one scan. A chunk has fewer than 2^16 pages, and fewer than 2^15 lie above.
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
def _select_at_once(
    scores_ptr, ids_ptr, page, exists, pages, recent_from, sinks, forced, budget,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Select from ``pages`` of CHUNK ascending pages, ``forced`` of them in any case.

    There are more of them than the budget, and no more than CHUNK: their keys stay in registers.
    """
    bits: tl.constexpr = 10 if CHUNK < 1024 else 21
    key = score_keys(scores_ptr, page, exists, recent_from, sinks)
    low = tl.zeros([], tl.uint32)
    first, second, third = _start(tl.max(tl.where(exists & (key != _HIGHEST), key, 0), 0))
    fields = _count(key, exists, first, second, third, bits)
    low, above, reaching, number = _narrow(
        fields, low, first, second, third, forced, pages, budget, bits
    )
    step = _first_step(number, reaching, budget)
    while step > 0:
        first, second, third = low + step, low + 2 * step, low + 3 * step
        fields = _count(key, exists, first, second, third, bits)
        low, above, reaching, number = _narrow(
            fields, low, first, second, third, above, reaching, budget, bits
        )
        step = tl.where(reaching == budget, 0, step >> 2)
    threshold, ties = _ties(low, above, reaching, budget)
    place_chosen(key, exists, page, threshold, ties, 0, 0, ids_ptr)


@triton.jit
def _count_chunks(
    scores_ptr, pages, recent_from, sinks, first, second, third, CHUNK: tl.constexpr
):  # fmt: skip
    """Count over all chunks of a row."""
    fields = tl.zeros([], tl.int64)
    for start in range(0, pages, CHUNK):
        page = start + tl.arange(0, CHUNK)
        exists = page < pages
        key = score_keys(scores_ptr, page, exists, recent_from, sinks)
        fields += _count(key, exists, first, second, third, 21)
    return fields


@triton.jit
def _select_by_chunks(
    scores_ptr, ids_ptr, pages, recent, sinks, budget, CHUNK: tl.constexpr
):  # fmt: skip
    """Select from a row of any length, which is read again for every question."""
    recent_from = pages - recent
    highest = tl.zeros([], tl.uint32)
    for start in range(0, pages, CHUNK):
        page = start + tl.arange(0, CHUNK)
        exists = page < pages
        key = score_keys(scores_ptr, page, exists, recent_from, sinks)
        here = tl.max(tl.where(exists & (key != _HIGHEST), key, 0), 0)
        highest = tl.where(here > highest, here, highest)
    low = tl.zeros([], tl.uint32)
    first, second, third = _start(highest)
    fields = _count_chunks(scores_ptr, pages, recent_from, sinks, first, second, third, CHUNK)
    low, above, reaching, number = _narrow(
        fields, low, first, second, third, recent + sinks, pages, budget, 21
    )
    step = _first_step(number, reaching, budget)
    while step > 0:
        first, second, third = low + step, low + 2 * step, low + 3 * step
        fields = _count_chunks(scores_ptr, pages, recent_from, sinks, first, second, third, CHUNK)
        low, above, reaching, number = _narrow(
            fields, low, first, second, third, above, reaching, budget, 21
        )
        step = tl.where(reaching == budget, 0, step >> 2)
    threshold, ties = _ties(low, above, reaching, budget)
    above_before = tl.zeros([], tl.int32)
    equal_before = tl.zeros([], tl.int32)
    for start in range(0, pages, CHUNK):
        page = start + tl.arange(0, CHUNK)
        exists = page < pages
        key = score_keys(scores_ptr, page, exists, recent_from, sinks)
        above_before, equal_before = place_chosen(
            key, exists, page, threshold, ties, above_before, equal_before, ids_ptr
        )


@triton.jit
def _select_row(
    scores_ptr, ids_ptr, pages, recent, sinks, budget, WIDTH: tl.constexpr,
    FILL: tl.constexpr, LEAST: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """Select from a whole row.

    Rows of up to LEAST pages, twice as many, and so on for SIZES sizes have code of their own: what
    a short row costs does not hang on how long a row may become.
    """
    if pages <= budget:
        for start in range(0, WIDTH, FILL):
            slot = start + tl.arange(0, FILL)
            tl.store(ids_ptr + slot, tl.where(slot < pages, slot, -1), mask=slot < WIDTH)
    elif pages > LEAST << (SIZES - 1):
        _select_by_chunks(scores_ptr, ids_ptr, pages, recent, sinks, budget, LEAST << (SIZES - 1))
    else:
        for size in tl.static_range(SIZES):
            fits = pages <= LEAST << size
            if size > 0:
                fits = fits & (pages > LEAST << (size - 1))
            if fits:
                page = tl.arange(0, LEAST << size)
                _select_at_once(
                    scores_ptr, ids_ptr, page, page < pages, pages, pages - recent, sinks,
                    recent + sinks, budget, LEAST << size,
                )  # fmt: skip


@triton.jit
def _select_piece(
    scores_ptr, ids_ptr, candidates_ptr, piece, pages, recent, sinks, last, budget,
    FILL: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Select from PIECE pages of a row; with ``last``, from the candidates of all pieces.

    A page that is not among the budget's best of its piece is not among those of its row, and what
    the pieces select, one behind the other, ascends. One code for both: when the second launch
    needs it, it has just been fetched.
    """
    recent_from = pages - recent
    place = tl.arange(0, PIECE)
    start = piece * PIECE
    end = tl.minimum(start + PIECE, pages)
    if last:
        count = pages // PIECE * budget + tl.minimum(pages % PIECE, budget)
        page = tl.load(candidates_ptr + place, mask=place < count, other=0)
        forced = recent + sinks
    else:
        count = end - start
        page = start + place
        forced = tl.maximum(0, end - tl.maximum(start, recent_from))
        forced += tl.maximum(0, tl.minimum(sinks, end) - start)
        ids_ptr = candidates_ptr + piece * budget
    if count > budget:
        _select_at_once(
            scores_ptr, ids_ptr, page, place < count, count, recent_from, sinks, forced, budget,
            PIECE,
        )  # fmt: skip
    else:
        # The end of a row. Never the last launch: it has more than the budget to select from.
        slot = tl.arange(0, FILL)
        tl.store(ids_ptr + slot, start + slot, mask=slot < count)


@triton.jit(do_not_specialize=["last"])
def select(
    scores_ptr, lens_ptr, ids_ptr, counts_ptr, candidates_ptr, scores_row, candidates_row, width,
    recent, sinks, last,
    BUDGET: tl.constexpr, SHARE: tl.constexpr, WIDTH: tl.constexpr, FILL: tl.constexpr,
    PAGE: tl.constexpr, LEAST: tl.constexpr, SIZES: tl.constexpr, PIECE: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Select the pages of a row (R3, R4); grid (pieces, rows), and (1, rows) with ``last``.

    Here a row is one of the TOKENS new tokens of a sequence (R10). It has WIDTH places for pages;
    without a SHARE these are BUDGET, which is what it selects.
    """
    piece = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    scores_ptr += row * scores_row
    ids_ptr += row * WIDTH
    n = tl.load(lens_ptr + row // TOKENS) - (TOKENS - 1) + (row % TOKENS).to(tl.int32)
    pages = tl.minimum(tl.cdiv(tl.maximum(n, 0), PAGE), width)
    budget = BUDGET
    if SHARE > 0:
        share = tl.cdiv(pages.to(tl.int64) * SHARE, _SHARE_DEN).to(tl.int32)
        budget = tl.maximum(share, BUDGET)
    in_pieces = False
    if PIECE > 0:
        in_pieces = pages > LEAST << (SIZES - 1)
    if in_pieces:
        if PIECE > 0:
            _select_piece(
                scores_ptr, ids_ptr, candidates_ptr + row * candidates_row, piece, pages, recent,
                sinks, last, budget, FILL, PIECE,
            )  # fmt: skip
    elif (piece == 0) & (last == 0):
        _select_row(scores_ptr, ids_ptr, pages, recent, sinks, budget, WIDTH, FILL, LEAST, SIZES)
    if (piece == 0) & (last == 0):
        tl.store(counts_ptr + row, tl.minimum(pages, budget))
        if SHARE > 0:
            # Behind what the row selects; nobody else writes there.
            for start in range(0, WIDTH, FILL):
                slot = start + tl.arange(0, FILL)
                tl.store(ids_ptr + slot, -1, mask=(slot >= budget) & (slot < WIDTH))
