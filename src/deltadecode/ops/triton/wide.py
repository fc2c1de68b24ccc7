"""Exact top-k of long rows by many thread blocks: the k-th largest key is found 11 bits at a time.

For rows that one thread block would have to read over and over. Three launches of ``count`` make
histograms of the keys' digits, each among the keys that share the digits found before; ``tally``
counts what each thread block selects, and ``place`` writes it in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltadecode.ops.triton.selection import place_chosen, score_keys


@triton.jit
def _digit(counts_ptr, wanted, BINS: tl.constexpr):
    """Digit of the ``wanted``-th largest key, and how many keys have a higher one."""
    digit = tl.arange(0, BINS)
    count = tl.load(counts_ptr + digit)
    higher = tl.sum(count, 0) - tl.cumsum(count, 0)
    here = (higher < wanted) & (wanted <= higher + count)
    return tl.sum(tl.where(here, digit, 0), 0), tl.sum(tl.where(here, higher, 0), 0)


@triton.jit
def _digits(counts_ptr, wanted, DIGITS: tl.constexpr, BINS: tl.constexpr):
    """First digits of the key that is looked for, and its rank among the keys that share them."""
    found = tl.zeros([], tl.uint32)
    for place in tl.static_range(DIGITS):
        digit, above = _digit(counts_ptr + place * BINS, wanted, BINS)
        found = (found << (11 if place < 2 else 10)) | digit.to(tl.uint32)
        wanted -= above
    return found, wanted


@triton.jit
def _pages(lens_ptr, row, width, PAGE: tl.constexpr):
    return tl.minimum(tl.cdiv(tl.load(lens_ptr + row), PAGE), width)


@triton.jit
def count(
    scores_ptr, lens_ptr, counts_ptr, scores_row, width, recent, sinks,
    BUDGET: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr,
    DIGIT: tl.constexpr,
):  # fmt: skip
    """Add a piece of a row to the row's histogram of a digit; grid (pieces, rows)."""
    row = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * TILE
    pages = _pages(lens_ptr, row, width, PAGE)
    if (pages <= BUDGET) | (start >= pages):
        return
    counts_ptr += row * 3 * BINS
    found, _ = _digits(counts_ptr, BUDGET, DIGIT, BINS)
    page = start + tl.arange(0, TILE)
    same = page < pages
    key = score_keys(scores_ptr + row * scores_row, page, same, pages - recent, sinks)
    if DIGIT == 0:
        digit = key >> 21
    elif DIGIT == 1:
        digit = (key >> 10) & 2047
        same = same & ((key >> 21) == found)
    else:
        digit = key & 1023
        same = same & ((key >> 10) == found)
    # What does not count is counted as 0, the lowest: ranks are counted from the highest.
    counted = tl.histogram(tl.where(same, digit, 0).to(tl.int32), BINS)
    at = counts_ptr + DIGIT * BINS + tl.arange(0, BINS)
    tl.atomic_add(at, counted, mask=counted > 0)


@triton.jit
def tally(
    scores_ptr, lens_ptr, counts_ptr, tallies_ptr, scores_row, width, recent, sinks,
    BUDGET: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Count a piece's keys above the threshold, and those equal to it; grid (pieces, rows)."""
    row = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * TILE
    pages = _pages(lens_ptr, row, width, PAGE)
    if (pages <= BUDGET) | (start >= pages):
        return
    threshold, _ = _digits(counts_ptr + row * 3 * BINS, BUDGET, 3, BINS)
    page = start + tl.arange(0, TILE)
    exists = page < pages
    key = score_keys(scores_ptr + row * scores_row, page, exists, pages - recent, sinks)
    at = tallies_ptr + (row * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(at, tl.sum((exists & (key > threshold)).to(tl.int32), 0))
    tl.store(at + 1, tl.sum((exists & (key == threshold)).to(tl.int32), 0))


@triton.jit
def place(
    scores_ptr, lens_ptr, counts_ptr, tallies_ptr, ids_ptr, selected_ptr, scores_row, width, recent,
    sinks,
    BUDGET: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """Write what is selected of a piece, behind that of the pieces before; grid (pieces, rows)."""
    row = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(0)
    pages = _pages(lens_ptr, row, width, PAGE)
    ids_ptr += row * BUDGET
    page = piece * TILE + tl.arange(0, TILE)
    exists = page < pages
    if piece == 0:
        tl.store(selected_ptr + row, tl.minimum(pages, BUDGET))
    if pages <= BUDGET:
        tl.store(ids_ptr + page, tl.where(exists, page, -1), mask=page < BUDGET)
    elif piece * TILE < pages:
        threshold, ties = _digits(counts_ptr + row * 3 * BINS, BUDGET, 3, BINS)
        before = tl.arange(0, PIECES)
        at = tallies_ptr + (row * tl.num_programs(0) + before) * 2
        above = tl.sum(tl.load(at, mask=before < piece, other=0), 0)
        equal = tl.sum(tl.load(at + 1, mask=before < piece, other=0), 0)
        key = score_keys(scores_ptr + row * scores_row, page, exists, pages - recent, sinks)
        place_chosen(key, exists, page, threshold, ties, above, equal, ids_ptr)
