"""Random inputs of the kernel benchmark, and the exact result for some of their rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.cases import BLOCK_SIZE, CFG, DIM, Shape, input_sets, moved_bytes
from deltadecode import ops

SCALE = DIM**-0.5
_DTYPE = torch.bfloat16
_ERROR_SEQUENCES = 4


@dataclass(frozen=True)
class Selection:
    """Pages of every row, as :func:`deltadecode.ops.select_pages` gives them; all int32."""

    page_ids: Tensor  # [B, K]
    page_counts: Tensor  # [B]
    blocks: Tensor  # [B, K], that hold these pages: a block table for any paged kernel
    tokens: Tensor  # [B], on these pages


@dataclass(frozen=True)
class Inputs:
    """Inputs of one shape; as many caches as it takes to exceed the L2 cache several times."""

    shape: Shape
    q: Tensor  # [B, Hq, D] bfloat16
    caches: list[tuple[Tensor, Tensor]]  # keys and values, [blocks, block_size, Hkv, D]
    block_table: Tensor  # [B, blocks of a row] int32, shuffled; the same for all caches
    seq_lens: Tensor  # [B] int32, all the context
    # Number of a cache and selection of every sparse call; no two read the same page.
    sparse: list[tuple[int, Selection]]


def inputs_bytes(shape: Shape, l2_bytes: int) -> int:
    """Bytes of device memory that a shape takes: all caches, and a Δ-layer's float32 logits."""
    logits = shape.batch * shape.context * shape.heads * 4
    return shape.cache_bytes * input_sets(shape.cache_bytes, l2_bytes) + logits


def make_inputs(shape: Shape, device: torch.device, l2_bytes: int) -> Inputs:
    """Make random inputs, the same whenever they are made for the same arguments."""
    generator = torch.Generator(device).manual_seed(0)
    row_blocks = ceil(shape.context / BLOCK_SIZE)
    blocks = shape.batch * row_blocks
    sets = input_sets(shape.cache_bytes, l2_bytes)
    # The layout of vLLM 0.24: a block holds its keys, then its values.
    size = (sets * blocks, 2, BLOCK_SIZE, shape.kv_heads, DIM)
    pool = torch.empty(size, dtype=_DTYPE, device=device).normal_(generator=generator)
    q = torch.empty((shape.batch, shape.heads, DIM), dtype=_DTYPE, device=device)
    table = torch.randperm(blocks, generator=generator, device=device).to(torch.int32)
    block_table = table.view(shape.batch, row_blocks)
    q.normal_(generator=generator)
    caches = [(part[:, 0], part[:, 1]) for part in pool.split(blocks)]
    lens = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=device)
    sparse = _sparse_sets(shape, block_table, sets, l2_bytes, generator)
    return Inputs(shape, q, caches, block_table, lens, sparse)


def _sparse_sets(
    shape: Shape, block_table: Tensor, caches: int, l2_bytes: int, generator: torch.Generator
) -> list[tuple[int, Selection]]:
    """Cut the pages, in random order, into selections: caches × selections are all different."""
    device = block_table.device
    pages, budget = shape.pages, CFG.budget_pages
    if pages <= budget:
        order = torch.arange(pages, device=device).expand(shape.batch, pages)
    else:
        order = torch.rand((shape.batch, pages), generator=generator, device=device).argsort(dim=1)
    wanted = input_sets(moved_bytes("sparse", shape), l2_bytes)
    rounds = min(ceil(wanted / caches), max(1, pages // budget))
    selections = [
        _selection(shape, block_table, order[:, budget * i : budget * (i + 1)])
        for i in range(rounds)
    ]
    return [(i % caches, selections[i // caches]) for i in range(min(wanted, rounds * caches))]


def _selection(shape: Shape, block_table: Tensor, pages: Tensor) -> Selection:
    pages = pages.sort(dim=1).values
    count = pages.shape[1]
    page_ids = torch.nn.functional.pad(pages, (0, CFG.budget_pages - count), value=-1)
    last = shape.pages - 1
    # All pages are full but the last one of a row.
    missing = shape.pages * CFG.page_size - shape.context
    tokens = count * CFG.page_size - missing * (pages == last).any(dim=1)
    return Selection(
        page_ids=page_ids.to(torch.int32),
        page_counts=torch.full_like(block_table[:, 0], count),
        blocks=block_table.gather(1, page_ids.clamp(min=0)),
        tokens=tokens.to(torch.int32),
    )


def our_calls(inputs: Inputs, backend: str) -> dict[str, list[Callable[[], Any]]]:
    """Prepare calls of our operations, one per input set.

    ``"dense"`` and ``"sparse"`` give the output [B, Hq, D]; ``"scores"`` (output, page scores), and
    ``"delta"`` (output, page ids, page counts).
    """

    def attend(cache: tuple[Tensor, Tensor], **options: Any) -> Any:
        return ops.decode_attention(
            inputs.q, *cache, inputs.block_table, inputs.seq_lens,
            scale=SCALE, page_size=CFG.page_size, backend=backend, **options,
        )  # fmt: skip

    def delta(cache: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        out, page_scores = attend(cache, return_page_scores=True)
        return out, *ops.select_pages(page_scores, inputs.seq_lens, CFG, backend=backend)

    return {
        "dense": [partial(attend, cache) for cache in inputs.caches],
        "scores": [partial(attend, cache, return_page_scores=True) for cache in inputs.caches],
        "delta": [partial(delta, cache) for cache in inputs.caches],
        "sparse": [
            partial(attend, inputs.caches[number], page_ids=s.page_ids, page_counts=s.page_counts)
            for number, s in inputs.sparse
        ],
    }


def exact_attention(inputs: Inputs, rows: int, sparse: bool) -> Tensor:
    """Attention of the first rows over the first cache in float64, [rows, Hq, D].

    Sparse: over the first selection rather than over all tokens.
    """
    shape = inputs.shape
    keys, values = inputs.caches[0]
    selection = inputs.sparse[0][1]
    outputs = []
    for row in range(min(rows, shape.batch)):
        if sparse:
            blocks = selection.blocks[row, : int(selection.page_counts[row])]
            tokens = int(selection.tokens[row])
        else:
            blocks, tokens = inputs.block_table[row], shape.context
        k, v = (cache[blocks.long()].flatten(0, 1)[:tokens].double() for cache in (keys, values))
        q = inputs.q[row].double().view(shape.kv_heads, -1, DIM)
        weights = (torch.einsum("hgd,thd->hgt", q, k) * SCALE).softmax(dim=-1)
        outputs.append(torch.einsum("hgt,thd->hgd", weights, v).reshape(shape.heads, DIM))
    return torch.stack(outputs)


def relative_error(out: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference ÷ that of the exact result.

    ``out`` [B, Hq, D] may have more rows than ``exact`` [rows, Hq, D] float64.
    """
    difference = out[: exact.shape[0]].double() - exact
    return float(difference.norm() / exact.norm())


def errors(
    inputs: Inputs, calls: Mapping[tuple[str, str], Sequence[Callable[[], Tensor]]]
) -> dict[tuple[str, str], float]:
    """Errors by (operation, side); the side ``""`` is the exact result in bfloat16."""
    relative: dict[tuple[str, str], float] = {}
    for op in ("dense", "sparse"):
        exact = exact_attention(inputs, _ERROR_SEQUENCES, sparse=op == "sparse")
        relative[op, ""] = relative_error(exact.to(inputs.q.dtype), exact)
        for (of, side), todo in calls.items():
            if of == op:
                relative[op, side] = relative_error(todo[0](), exact)
    return relative
