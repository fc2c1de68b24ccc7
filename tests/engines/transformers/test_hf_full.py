"""Full attention with a mask, some rows of a batch or some queries of a row at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltadecode.engines.transformers import full


def padded_batch():
    """Query [5, 4, 7, 8], keys and values [5, 2, 7, 8], mask [5, 1, 7, 7]."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, 4, 7, 8, generator=generator)
    key, value = torch.randn(2, 5, 2, 7, 8, generator=generator)
    start = torch.tensor([0, 3, 1, 0, 6])
    place = torch.arange(7)
    mask = (place <= place[:, None]) & (place >= start[:, None, None])
    return query, key, value, (mask | torch.eye(7, dtype=torch.bool))[:, None]


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("shared_mask", [False, True])
def test_pieces_of_a_batch_are_the_batch(monkeypatch, rows, shared_mask):
    query, key, value, mask = padded_batch()
    mask = mask[:1] if shared_mask else mask
    module = nn.Module()
    module.num_key_value_groups = 2

    def attend():
        return full.full_attention(module, query, key, value, mask, dropout=0.0, scaling=None)

    whole = attend()
    seen = []

    def some(query, mask):
        seen.append(query.shape[0])
        return rows

    monkeypatch.setattr(full, "rows_at_once", some)
    torch.testing.assert_close(attend(), whole)
    assert seen == [5]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", ["each row", "shared", "each head", "added"])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_pieces_of_a_row_are_the_row(monkeypatch, count, kind, scaling):
    query, key, value, mask = padded_batch()
    query, mask = query[:, :, 3:], mask[:, :, 3:]  # a chunk of a prompt, behind others
    if kind == "shared":
        mask = mask[:1]
    if kind == "each head":
        mask = (
            mask
            | (torch.arange(4)[:, None, None] == torch.arange(7)) & (mask.sum(3) > 2)[..., None]
        )
    if kind == "added":
        mask = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)).where(
            mask, -torch.inf
        )
    module = nn.Module()
    module.num_key_value_groups = 2

    def attend():
        return full.full_attention(module, query, key, value, mask, dropout=0.0, scaling=scaling)

    whole = attend()
    monkeypatch.setattr(full, "queries_at_once", lambda *_: count)
    monkeypatch.setattr(full, "sdpa_attention_forward", None)
    torch.testing.assert_close(attend(), whole)


def test_queries_are_bounded_by_the_mask_of_a_long_chunk(monkeypatch):
    # 36 layers of 32 heads and 8 KV heads read 262,144 tokens in chunks of 8,192.
    class OnGpu:
        shape, is_cpu = (1, 32, 8192, 128), False

        def element_size(self):
            return 2

    def at_once(tokens, heads=1):
        key = torch.empty(1, 8, tokens, 128, device="meta")
        mask = torch.empty(1, heads, 8192, tokens, device="meta")
        return full.queries_at_once(OnGpu(), key, mask)

    assert at_once(2**18) == 2**29 // (2 * 4 * 2**18) == 256
    # PyTorch copies an additive mask over all heads, so there are eight times as many.
    assert at_once(2**18 - 5) == at_once(2**18, heads=32) == 32
    assert at_once(8192) == 8192
    assert full.queries_at_once(OnGpu(), torch.empty(1, 8, 2**18, 128, device="meta"), None) == 8192
    monkeypatch.setattr(OnGpu, "is_cpu", True)
    assert at_once(2**18) == 8192


def test_rows_are_bounded_by_the_mask_over_all_heads(monkeypatch):
    # What counts is the device of the query, so a stand-in for one on a GPU is enough.
    class OnGpu:
        shape, is_cpu = (200, 4, 1958, 64), False

        def element_size(self):
            return 4

    mask = torch.empty(1, 1, 1958, 1958, dtype=torch.bool)
    assert full.rows_at_once(OnGpu(), mask) == 2**29 // (4 * 1958 * 1958 * 4) == 8
    assert full.rows_at_once(OnGpu(), None) == 200
    monkeypatch.setattr(OnGpu, "is_cpu", True)
    assert full.rows_at_once(OnGpu(), mask) == 200
    monkeypatch.setattr(OnGpu, "is_cpu", False)
    monkeypatch.setattr(full, "_MASK_BYTES", 1)
    assert full.rows_at_once(OnGpu(), mask) == 1
