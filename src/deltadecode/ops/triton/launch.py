"""Shapes of the launches: tiles, warps and splits, from shapes and dtypes alone.

Nothing here reads a value on the device: a launch grid is the same for every batch of a shape, so
that a decode step captures into one CUDA graph.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

# Thread blocks of the attention kernel that a multiprocessor holds: its tiles take half of the
# shared memory.
_BLOCKS_PER_SM = 2
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
    """

    tokens: int
    warps: int
    stages: int


def tile(dim: int, itemsize: int, sparse: bool) -> Tile:
    """Tile of the attention kernel.

    Parameters
    ----------
    dim : int
        Head size, padded to a power of two.
    itemsize : int
        Bytes of an element of the cache.
    sparse : bool
        Whether it reads selected pages.

    Returns
    -------
    Tile
        64 tokens of 128 bfloat16, 2 warps and 5 stages were the best of 32 shapes on an H200 at
        8k and 32k tokens; others move as many bytes at a time.
    """
    row = dim * itemsize
    if row > 512:
        return Tile(16, 4, 3)
    if row > 256:
        return Tile(32, 4, 4)
    return Tile(64, 2, 5)


@functools.cache
def splits(programs: int, tokens: int, sms: int) -> int:
    """Parts that each row's tokens are split into.

    Parameters
    ----------
    programs : int
        Thread blocks without a split: rows times KV heads.
    tokens : int
        Most tokens that a row can have.
    sms : int
        Multiprocessors of the device.

    Returns
    -------
    int
        What wastes least of the last wave of thread blocks; the fewest of equals.
    """
    slots = _BLOCKS_PER_SM * sms
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
