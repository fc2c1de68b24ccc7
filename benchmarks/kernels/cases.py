"""What the kernel benchmark measures: shapes, the bytes each operation moves, input sets."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, log2

from deltadecode.config import DeltaConfig

# The budget of arXiv 2510.09883; which layer does what plays no part here.
CFG = DeltaConfig(page_size=16, budget_pages=64, recent_pages=8, sink_pages=0)
DIM = 128
ITEMSIZE = 2  # bfloat16
# vLLM's default, and a page: a selection is a block table then, which its kernels can read.
BLOCK_SIZE = 16

# Query and KV heads of DeepSeek-R1-Distill-Qwen-1.5B and -7B, and of Llama-3.1-8B and Qwen3-8B.
HEADS = ((12, 2), (28, 4), (32, 8))
BATCHES = (1, 16, 64, 128)
CONTEXTS = tuple(2**power for power in range(10, 18))
# Batch and context of a quick run.
QUICK = ((64, 1024), (64, 8192), (64, 16384), (64, 32768), (1, 131072))
# Rows and pages of the selection that is measured whatever the shapes are.
SELECT_FIXED = (64, 2048)
# Errors are taken at the context nearest to it.
_ERROR_CONTEXT = 8192

_HEADS = re.compile(r"([1-9][0-9]*)/([1-9][0-9]*)")
# A graph of this many calls is long enough to time, and it keeps small shapes from having
# thousands of input sets.
_MAX_SETS = 256
# A cache this many times smaller than what is read in a round holds little of it in the next.
_L2_TIMES = 4
_GRAPH_US = 400.0
# About what a kernel takes that does nothing, and what a recent GPU reads; only to guess how many
# calls fill a graph.
_LEAST_US = 3.0
_BYTES_PER_US = 3e6


@dataclass(frozen=True)
class Shape:
    """One decode step of one layer: Hq, Hkv, rows, and tokens n of each, the new one included."""

    heads: int
    kv_heads: int
    batch: int
    context: int

    @property
    def heads_label(self) -> str:
        """``Hq/Hkv``, as ``--heads`` takes it."""
        return f"{self.heads}/{self.kv_heads}"

    @property
    def label(self) -> str:
        """Shape in words."""
        return f"heads {self.heads_label}, batch {self.batch}, context {self.context}"

    @property
    def pages(self) -> int:
        """Pages N of a row."""
        return ceil(self.context / CFG.page_size)

    @property
    def token_bytes(self) -> int:
        """Bytes b of a token's keys and values: 2 · Hkv · D · itemsize."""
        return 2 * self.kv_heads * DIM * ITEMSIZE

    @property
    def cache_bytes(self) -> int:
        """Bytes of the blocks that hold all rows."""
        return self.batch * ceil(self.context / BLOCK_SIZE) * BLOCK_SIZE * self.token_bytes


def moved_bytes(op: str, shape: Shape) -> int:
    """Bytes that an operation has to move over all rows.

    ``"dense"``: n · b a row. ``"scores"`` (attention and page scores) and ``"delta"`` (these and
    the selection): the float32 logits of all query heads too, written and read. ``"sparse"``:
    min(n, K · P) · b. ``"select"``: the float32 page scores. Queries, outputs and tables, which
    are small beside them, are left out.
    """
    n = shape.context
    with_logits = n * (shape.token_bytes + 2 * shape.heads * 4)
    selected = min(n, CFG.budget_pages * CFG.page_size)
    per_row = {
        "dense": n * shape.token_bytes, "scores": with_logits, "delta": with_logits,
        "sparse": selected * shape.token_bytes, "select": shape.pages * 4,
    }  # fmt: skip
    return shape.batch * per_row[op]


def input_sets(call_bytes: int, l2_bytes: int) -> int:
    """Input sets to go round, so that the L2 cache holds little of the next one.

    As many as together exceed four times the cache, from 1 to 256.
    """
    return min(_L2_TIMES * l2_bytes // call_bytes + 1, _MAX_SETS)


def calls_per_graph(call_bytes: int, sets: int) -> int:
    """Calls to put into one CUDA graph, a multiple of the input sets.

    As many as take some 400 µs in a replay, since events resolve half a microsecond.
    """
    guess_us = max(_LEAST_US, call_bytes / _BYTES_PER_US)
    return sets * ceil(_GRAPH_US / (sets * guess_us))


def parse_heads(text: str) -> tuple[int, int]:
    """Read ``Hq/Hkv``, such as ``12/2``; a ValueError for anything else."""
    match = _HEADS.fullmatch(text)
    if not match or int(match[1]) % int(match[2]):
        raise ValueError(
            f"heads must be query heads/KV heads, the second dividing the first, got {text!r}"
        )
    return int(match[1]), int(match[2])


def grid(
    *,
    quick: bool = False,
    heads: Sequence[tuple[int, int]] = (),
    batches: Sequence[int] = (),
    contexts: Sequence[int] = (),
) -> list[Shape]:
    """List the shapes of a run without repetition: by heads, then batch, then context.

    What is given replaces the usual values; in a quick run, of five shapes with the first heads,
    batches and contexts choose among them instead. A ValueError where nothing is left.
    """
    for name, values in (("batch", batches), ("context", contexts)):
        if min(values, default=1) < 1:
            raise ValueError(f"{name} must be at least 1, got {min(values)}")
    if quick:
        pairs = [(b, n) for b, n in QUICK if b in (batches or (b,)) and n in (contexts or (n,))]
    else:
        pairs = [(b, n) for b in batches or BATCHES for n in contexts or CONTEXTS]
    if not pairs:
        raise ValueError(
            f"a quick run has (batch, context) {', '.join(map(str, QUICK))}; nothing is left with "
            f"batch {list(batches) or 'any'} and context {list(contexts) or 'any'}"
        )
    chosen = heads or (HEADS[:1] if quick else HEADS)
    return list(dict.fromkeys(Shape(*pair, batch, n) for pair in chosen for batch, n in pairs))


def error_shapes(shapes: Iterable[Shape]) -> set[Shape]:
    """Choose the shapes at which errors are taken too.

    One per head shape: of the context nearest to 8,192, the one with the smallest batch.
    """

    def distance(shape: Shape) -> tuple[float, int]:
        return abs(log2(shape.context / _ERROR_CONTEXT)), shape.batch

    ordered = sorted(shapes, key=distance, reverse=True)
    return set({shape.heads_label: shape for shape in ordered}.values())
