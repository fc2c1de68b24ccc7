"""Shapes of the launches: tiles, warps and splits, from shapes and dtypes alone.

Nothing here reads a value on the device: a launch grid is the same for every batch of a shape, so
that a decode step captures into one CUDA graph.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton

# Below this many tokens a split does not earn its share of the merge.
_LEAST_TOKENS = 64
_MOST_SPLITS = 128
# Logits that a thread block turns into scores at a time, and its warps, by sweeps on an H200. Many
# heads are read quicker in small bites, unless each bite has to add up many splits first.
_LARGE, _SMALL = (8192, 4), (2048, 2)
_SMALL_FROM, _SMALL_PARTS = 512, 8
# Such blocks to a multiprocessor. Where a table is far wider than its rows, a block for every few
# pages that may come would take a Δ-layer 1.2 to 1.3 times as long.
_FINISHING = 16
# Numbers that a thread block merges, over all splits: a head of 128 splits is too much for one.
_MERGED = 4096
# Queries of a tile, over the heads of a group and the tokens of a verify row.
_QUERIES = 32
# Pages of the shortest row that the selection has code for.
_LEAST_PAGES = 512
# Longer rows than that are selected from in pieces, where they are so few: a second launch costs
# what the pieces save as soon as the rows alone keep the device busy.
_WHOLE_PAGES, _FEW_ROWS = 4096, 32
# Pages that a thread block selects from; the first size that fits.
_PIECES = (1024, 2048, 4096, 8192)
# Rows of more pages than that always go in pieces, if need be in these. They have room for what
# the pieces of 512k tokens find, 2,048 each. A thread keeps 32 keys then, few of them outside of
# its registers.
LONG_ROWS, _LONG_PIECES, _KEYS_OF_WARP = 32768, (16384, 32768), 1024
# Pages that a piece may select: so many ids are written at a time where none is ranked.
MOST_OF_A_PIECE = 4096
# Pages for which a thread block has 8 warps. Beyond, twice as many: their code is half as long, and
# comes from a cache that the attention before has just swept.
_FEW_PAGES = 2048
# Selected pages that a thread block keeps at a time, where a row can have more than so many.
_LISTED, _WHOLE_LIST = 128, 512
# What a split costs, as a part of a row's time: it is written, and read once more.
_SPLIT = 0.02

T = TypeVar("T")


@dataclass(frozen=True)
class Tile:
    """Compile-time shape of the attention kernel.

    Attributes
    ----------
    tokens : int
        Tokens of one step of its loop, a power of two.
    warps, stages : int
        Warps of a thread block, and depth of its software pipeline.
    rounds : tuple of float
        Time that 1, 2, ... thread blocks take which share a multiprocessor, up to as many as its
        shared memory and registers hold; the unit is what one takes of the time of many. A few are
        slower than that: they have too little in flight.
    """

    tokens: int
    warps: int
    stages: int
    rounds: tuple[float, ...]


# By bytes of a key. Shapes and times are of sweeps on an H200, over 1k to 32k tokens; how many
# thread blocks fit is what the compiler says of sm_90.
_FULL = (
    (256, (Tile(64, 2, 5, (1.8, 2, 3)), Tile(64, 2, 4, (2.5, 2.9, 3.6, 3.95)))),
    (512, (Tile(32, 4, 4, (1.8, 2)),)),
    (1024, (Tile(16, 4, 3, (1.8, 2)),)),
)
# The same for more lines of queries than one instruction multiplies, as of rows that verify drafts:
# more warps for them, and two blocks to a multiprocessor. Swept over 4 and 5 queries of 6 heads.
_FULL_LINES = ((256, (Tile(64, 4, 5, (1.45, 2)),)), *_FULL[1:])
_LINES = 16
# Of 1,024 selected tokens: little to read, so what counts is that much of it is in flight at once.
_SPARSE = (
    (256, (Tile(128, 4, 3, (1,)), Tile(64, 4, 4, (1.1, 1.7)))),
    (512, (Tile(64, 4, 3, (1,)),)),
    (1024, (Tile(32, 4, 3, (1,)),)),
)
# The same, of so few rows that they are split: a tile is then most of what a thread block reads.
_SPARSE_SPLIT = (
    (256, Tile(64, 4, 4, (1,))),
    (512, Tile(32, 4, 4, (1,))),
    (1024, Tile(16, 4, 3, (1,))),
)


def padded(rows: int) -> int:
    """Rows that a launch of ``rows`` ≥ 1 is shaped for: a size that CUDA graphs are captured for.

    Engines have any number of rows outside of graphs, and each would compile kernels of its own.
    """
    if rows <= 4:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 256 else 16
    return -(-rows // step) * step


@functools.lru_cache(maxsize=4096)
def attention_shape(
    dim: int,
    itemsize: int,
    programs: int,
    tokens: int,
    sparse: bool,
    lines: int,
    device: torch.device,
) -> tuple[Tile, int]:
    """Tile of the attention kernel, and the parts that each row's tokens are split into.

    Parameters
    ----------
    dim, itemsize : int
        Head size, padded to a power of two, and bytes of an element of the cache.
    programs : int
        Thread blocks without a split: rows times KV heads.
    tokens : int
        Most tokens that a row can attend to.
    sparse : bool
        Whether the kernel reads selected pages.
    lines : int
        Queries of a tile, over the heads of a group and the tokens of a row.
    device : torch.device
        Where it runs.
    """
    sms, key_bytes = hardware(device).multiprocessors, dim * itemsize
    # A power of two, so that a growing cache compiles a kernel a few times, not at every length.
    most = min(_MOST_SPLITS, 1 << max(1, tokens // _LEAST_TOKENS).bit_length() - 1)
    if sparse and 4 * programs >= 3 * sms:
        return _quickest(_by_bytes(_SPARSE, key_bytes), programs, 1, sms)
    if sparse:
        # Two thread blocks to a multiprocessor, whether they are there at once or in turn.
        parts = 1 << max(1, 2 * sms // programs).bit_length() - 1
        return _by_bytes(_SPARSE_SPLIT, key_bytes), min(most, parts)
    tiles = _FULL_LINES if lines > _LINES else _FULL
    return _quickest(_by_bytes(tiles, key_bytes), programs, most, sms)


def tokens_in_tile(tokens: int, group: int) -> int:
    """How many of a row's ``tokens`` queries share a tile of keys, ``group`` heads to each."""
    turns = math.ceil(tokens / max(1, _QUERIES // group))
    return math.ceil(tokens / turns)


def page_list(width: int, tile: int, page_size: int) -> tuple[int, int]:
    """How a thread block reads a row's list of up to ``width`` selected pages.

    Returns the pages that it keeps at a time, a power of two, and the tokens that it attends to
    before it fetches the next ones, whole tiles; 0 where it keeps the whole list.
    """
    if width <= _WHOLE_LIST:
        return triton.next_power_of_2(max(width, 16)), 0
    listed = max(_LISTED, triton.next_power_of_2(2 * math.ceil(tile / page_size)))
    # Where tiles begin inside of pages, the last page may be needed again.
    whole = listed if tile % page_size == 0 else listed - 1
    return listed, whole * page_size // tile * tile


def _by_bytes(tiles: tuple[tuple[int, T], ...], key_bytes: int) -> T:
    return next(tile for most, tile in tiles if key_bytes <= most)


def _quickest(tiles: tuple[Tile, ...], programs: int, most: int, sms: int) -> tuple[Tile, int]:
    """Tile and parts, up to ``most``, by the reckoning of :func:`_time`; the first of equals."""
    choices = ((tile, parts) for parts in range(1, most + 1) for tile in tiles)
    return min(choices, key=lambda choice: _time(choice[0], choice[1], programs, sms))


def _time(tile: Tile, parts: int, programs: int, sms: int) -> float:
    """Time of ``programs`` rows of one length, each in ``parts``, in units of a row's own."""
    whole, rest = divmod(programs * parts, len(tile.rounds) * sms)
    time = whole * tile.rounds[-1]
    if rest:
        time += tile.rounds[math.ceil(rest / sms) - 1]
    return time / parts * (1 + _SPLIT * parts)


def finish_shape(
    page_logits: int, pages: int, rows: int, parts: int, dim: int, device: torch.device
) -> tuple[int, int, int, int]:
    """Shape of the kernel that merges splits and scores pages.

    Parameters
    ----------
    page_logits : int
        Logits of a page, over all query heads, both padded to powers of two.
    pages : int
        Most pages that a row can have.
    rows, parts : int
        Rows of the launch, and parts that each row's attention was split into.
    dim : int
        Head size, padded to a power of two.
    device : torch.device
        Where it runs.

    Returns
    -------
    programs : int
        Thread blocks of each row that score; together they fill the device, whatever a row may
        grow to.
    pages_at_once : int
        Pages that a thread block scores in one step of its loop.
    warps : int
        Warps of a thread block.
    dims : int
        Numbers of a head that a thread block merges.
    """
    small = page_logits >= _SMALL_FROM and parts <= _SMALL_PARTS
    scored, warps = _SMALL if small else _LARGE
    at_once = max(1, scored // page_logits)
    programs = math.ceil(hardware(device).multiprocessors * _FINISHING / rows)
    dims = max(16, min(dim, _MERGED // triton.next_power_of_2(parts)))
    return max(1, min(math.ceil(pages / at_once), programs)), at_once, warps, dims


@dataclass(frozen=True)
class SelectionShape:
    """Compile-time shape of the selection, and its launches.

    Attributes
    ----------
    least, sizes : int
        Rows of up to ``least`` pages, of twice as many, and so on have code of their own, for so
        many sizes.
    pieces, piece : int
        Thread blocks of a row, and the pages that each selects from when the row is longer than
        the largest size; then a second launch selects from their candidates. 1 and 0 where one
        block reads a longer row in turns.
    warps : int
        Warps of a thread block.
    """

    least: int
    sizes: int
    pieces: int
    piece: int
    warps: int


@functools.lru_cache(maxsize=4096)
def selection_shape(rows: int, width: int, budget: int) -> SelectionShape:
    """Shape of the selection of ``budget`` pages from rows of up to ``width`` pages."""
    sizes: tuple[int, ...] = _PIECES if width > _WHOLE_PAGES and rows <= _FEW_ROWS else ()
    if width > LONG_ROWS and budget <= MOST_OF_A_PIECE:
        sizes += _LONG_PIECES
    # What all pieces of a row find has to fit in one.
    fitting = (size for size in sizes if math.ceil(width / size) * budget <= size < width)
    piece = next(fitting, 0)
    if piece in _LONG_PIECES:
        # Code for this many and for a half and a quarter of it: each takes long to compile.
        warps = piece // _KEYS_OF_WARP
        return SelectionShape(piece // 4, 3, math.ceil(width / piece), piece, warps)
    if piece:
        most = max(_FEW_PAGES, piece)
    else:
        most = min(_PIECES[-1], max(_LEAST_PAGES, triton.next_power_of_2(width)))
    pieces = math.ceil(width / piece) if piece else 1
    warps = 8 if (piece or most) <= _FEW_PAGES else 16
    return SelectionShape(_LEAST_PAGES, (most // _LEAST_PAGES).bit_length(), pieces, piece, warps)


@dataclass(frozen=True)
class Hardware:
    """What launches and refusals depend on; the capability is (major, minor)."""

    multiprocessors: int
    capability: tuple[int, int]


@functools.cache
def hardware(device: torch.device) -> Hardware:
    """Facts of a device; those of a Hopper GPU for a CPU, where the interpreter runs."""
    if device.type != "cuda":
        return Hardware(132, (9, 0))
    gpu = torch.cuda.get_device_properties(device)
    return Hardware(int(gpu.multi_processor_count), (int(gpu.major), int(gpu.minor)))
