"""Endless batches of chain problems, made by worker processes.

A batch has one padded length. Numbers of steps, of distractors and the least recall distance are
drawn at random, so that no position and no distance gives an answer away.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from deltadecode.lab.tasks.chain import (
    PLAIN_STEP_TOKENS,
    RECALL_SHARE,
    RECALL_STEP_TOKENS,
    Problem,
    make_problem,
)
from deltadecode.lab.tasks.vocabulary import EOS_ID, NAMES, PAD_ID, encode

FACT_TOKENS = 8
FRAME_TOKENS = 64  # question, headings, the ending fact and the answer line, rounded up


def draw_problem(rng: random.Random, length: int) -> Problem:
    """A problem of random proportions that fits `length` tokens."""
    share = rng.choice((0.0, 0.05, 0.1, 0.15, 0.3, 0.6))
    per_step = (
        FACT_TOKENS * (1 + share)
        + PLAIN_STEP_TOKENS
        + (RECALL_STEP_TOKENS - PLAIN_STEP_TOKENS) / RECALL_SHARE
    )
    most = min(int((length - FRAME_TOKENS) / per_step), int((len(NAMES) - 2) / (1 + share)))
    steps = rng.randint(max(1, int(0.75 * most)), most)
    available = (steps - steps // RECALL_SHARE - 2) * PLAIN_STEP_TOKENS
    min_back = int(max(0, available) * rng.random() * 0.7)
    return make_problem(rng.getrandbits(62), steps, int(share * steps), min_back)


def to_arrays(problem: Problem, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and next-token targets (-100 outside the solution), both `[length]`."""
    prompt, solution = encode(problem.prompt), [*encode(problem.solution), EOS_ID]
    ids = np.full(length + 1, PAD_ID, dtype=np.int64)
    targets = np.full(length, -100, dtype=np.int64)
    total = len(prompt) + len(solution)
    ids[:total] = prompt + solution
    targets[len(prompt) - 1 : total - 1] = solution
    return ids[:length], targets


def make_batch(seed: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """A batch of fresh problems: ids and targets, both `[rows, length]` int64."""
    rng = random.Random(seed)
    pairs = [to_arrays(draw_problem(rng, length), length) for _ in range(rows)]
    ids, targets = zip(*pairs, strict=True)
    return torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(targets))


class Batches(torch.utils.data.IterableDataset):
    """Batches of one length, a disjoint stream of seeds per worker."""

    def __init__(self, seed: int, rows: int, length: int) -> None:
        self.seed, self.rows, self.length = seed, rows, length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = torch.utils.data.get_worker_info()
        worker = info.id if info else 0
        rng = random.Random(f"{self.seed}/{self.length}/{worker}")
        while True:
            yield make_batch(rng.getrandbits(62), self.rows, self.length)


def loader(seed: int, rows: int, length: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over batches made in the background."""
    data = torch.utils.data.DataLoader(
        Batches(seed, rows, length),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(data)
