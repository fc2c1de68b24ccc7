"""Shapes of the launches: tiles, warps and splits, from shapes and dtypes alone.

Nothing here reads a value on the device: a launch grid is the same for every batch of a shape, so
that a decode step captures into one CUDA graph.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

# Below this many tokens a split does not earn its share of the merge.
_LEAST_TOKENS = 64
_MOST_SPLITS = 128


@dataclass(frozen=True)
class Tile:
    """Compile-time shape of the attention kernel.

    Attributes
    ----------
    tokens : int
        Tokens of one step of its loop, a power of two.
    warps, stages : int
        Warps of a thread block, and depth of its software pipeline.
    per_sm : int
        Thread blocks that a multiprocessor holds: what their shared memory allows.
    """

    tokens: int
    warps: int
    stages: int
    per_sm: int


# By bytes of a key, for 64 tokens of 256 bytes or as many bytes otherwise: of 32 shapes on an H200
# the best at 8k and 32k tokens.
_FULL = ((256, Tile(64, 2, 5, 2)), (512, Tile(32, 4, 4, 2)), (1024, Tile(16, 4, 3, 2)))
# Of 1,024 selected tokens: one thread block per row and KV head, with much in flight, where these
# fill the device (23.8 µs against 26.3 at 64 rows of 2 KV heads), else smaller tiles of splits.
_SPARSE = ((256, Tile(128, 4, 3, 1)), (512, Tile(64, 4, 3, 1)), (1024, Tile(32, 4, 3, 1)))


@functools.lru_cache(maxsize=4096)
def attention_shape(
    dim: int, itemsize: int, programs: int, tokens: int, sparse: bool, device: torch.device
) -> tuple[Tile, int]:
    """Tile of the attention kernel, and the parts that each row's tokens are split into.

    Parameters
    ----------
    dim : int
        Head size, padded to a power of two.
    itemsize : int
        Bytes of an element of the cache.
    programs : int
        Thread blocks without a split: rows times KV heads.
    tokens : int
        Most tokens that a row can attend to.
    sparse : bool
        Whether the kernel reads selected pages.
    device : torch.device
        Where it runs.

    Returns
    -------
    tile : Tile
        Its keys and values fit in shared memory in every stage.
    parts : int
        At least 1.
    """
    sms = multiprocessors(device)
    if sparse:
        tile = _by_bytes(_SPARSE, dim * itemsize)
        parts = splits(programs, tokens, tile.per_sm * sms)
        if parts <= 2:
            return tile, parts
    tile = _by_bytes(_FULL, dim * itemsize)
    return tile, splits(programs, tokens, tile.per_sm * sms)


def _by_bytes(tiles: tuple[tuple[int, Tile], ...], key_bytes: int) -> Tile:
    return next(tile for most, tile in tiles if key_bytes <= most)


def splits(programs: int, tokens: int, slots: int) -> int:
    """Parts that each row's tokens are split into.

    Parameters
    ----------
    programs : int
        Thread blocks without a split.
    tokens : int
        Most tokens that a row can attend to.
    slots : int
        Thread blocks that the device holds at a time.

    Returns
    -------
    int
        What wastes least of the last wave of thread blocks; the fewest of equals.
    """
    # A power of two, so that a growing cache compiles a kernel a few times, not at every length.
    most = min(_MOST_SPLITS, 1 << max(1, tokens // _LEAST_TOKENS).bit_length() - 1)

    def wasted(parts: int) -> float:
        waves = programs * parts / slots
        # A part costs something too: what it writes is read once more.
        return math.ceil(waves) / waves + 0.01 * parts

    return min(range(1, most + 1), key=wasted)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device; of a Hopper GPU for a CPU, where the interpreter runs.

    Parameters
    ----------
    device : torch.device
        Where the tensors are.

    Returns
    -------
    int
    """
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
