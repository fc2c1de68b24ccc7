"""Scores of an index: every backend against the dot products, and the exact top-k of them."""

import math

import pytest
import torch
from ops_oracle import BACKENDS

from deltadecode import DeltaConfig, ops
from deltadecode.errors import OperationError


def _case(lengths, block_size, blocks, dim=24, dtype=torch.float32):
    """A cache in which everything but the rows' tokens is NaN."""
    rows, count = len(lengths), len(lengths) * blocks
    keys = torch.full((count + 1, block_size, dim), math.nan, dtype=dtype)
    table = torch.randperm(count + 1)[:count].view(rows, blocks).int()
    q = torch.randn(rows, dim, dtype=dtype)
    wanted = []
    for row, n in enumerate(lengths):
        token, k = torch.arange(n), torch.randn(n, dim).to(dtype)
        keys[table[row, token // block_size].long(), token % block_size] = k
        wanted.append(k.double() @ q[row].double() * 0.5)
    return (q, keys, table, torch.tensor(lengths, dtype=torch.int32)), wanted


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size, blocks", [(1, 300), (16, 20), (300, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_dot_products(backend, block_size, blocks, dtype):
    lengths = [300, 1, 0, 129]
    arguments, wanted = _case(lengths, block_size, blocks, dtype=dtype)
    scores = ops.index_scores(*arguments, scale=0.5, backend=backend)
    assert (scores.shape, scores.dtype) == ((4, block_size * blocks), torch.float32)
    for row, n in enumerate(lengths):
        torch.testing.assert_close(scores[row, :n].double(), wanted[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_an_index_are_the_exact_top_k(backend):
    lengths, k = [300, 40, 41, 7], 40
    arguments, wanted = _case(lengths, 300, 1)
    scores = ops.index_scores(*arguments, backend=backend)
    cfg = DeltaConfig(page_size=1, budget_pages=k, recent_pages=0, sink_pages=0)
    ids, counts = ops.select_pages(scores, arguments[3], cfg, backend=backend)
    for row, n in enumerate(lengths):
        top = sorted(wanted[row].topk(min(k, n)).indices.tolist())
        assert ids[row, : counts[row]].tolist() == top


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [1, 150])
def test_attention_to_single_tokens(backend, block_size):
    rows, n, k = 2, 150, 33
    q, cache = torch.randn(rows, 6, 16), torch.randn(2, rows * n, 2, 16)
    ids = torch.stack([torch.randperm(n)[:k].sort().values for _ in range(rows)]).int()
    table = torch.arange(rows * n // block_size, dtype=torch.int32).view(rows, -1)
    out = ops.decode_attention(
        q, *cache.view(2, -1, block_size, 2, 16), table, torch.full((rows,), n, dtype=torch.int32),
        scale=0.25, page_size=1, page_ids=ids, page_counts=torch.tensor([k, k - 1]).int(),
        backend=backend,
    )  # fmt: skip
    for row, count in enumerate((k, k - 1)):
        keys, values = cache.view(2, rows, n, 2, 16)[:, row, ids[row, :count].long()]
        logits = torch.einsum("hgd,thd->hgt", q[row].view(2, 3, 16), keys) * 0.25
        wanted = torch.einsum("hgt,thd->hgd", logits.softmax(-1), values).flatten(0, 1)
        torch.testing.assert_close(out[row], wanted, rtol=1e-5, atol=1e-5)


def test_inputs_that_do_not_fit_are_refused():
    (q, keys, table, lens), _ = _case([5], 8, 2)
    for arguments, message in (
        ((q[0], keys, table, lens), r"q must be a float \[B, D\]"),
        ((q, keys[..., :4], table, lens), "keys must be"),
        ((q, keys, table.long(), lens), "block_table must be int32"),
        ((q, keys, table, lens + 12), "must not exceed the 16 tokens"),
        ((q, keys, table, -lens), "must not be negative, got -5"),
        ((q, keys[:, :0], table, lens), "keys must be"),
        ((q, keys, None, lens), "block_table must be a tensor, got NoneType"),
    ):
        with pytest.raises(OperationError, match=message):
            ops.index_scores(*arguments)
    for scale in ("x", None, float("nan")):
        with pytest.raises(OperationError, match="scale must be a finite number"):
            ops.index_scores(q, keys, table, lens, scale=scale)
