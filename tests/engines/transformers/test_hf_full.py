"""Full attention over a padded batch, some rows at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltadecode.engines.transformers import full


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("shared_mask", [False, True])
def test_pieces_of_a_batch_are_the_batch(monkeypatch, rows, shared_mask):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, 4, 7, 8, generator=generator)
    key, value = torch.randn(2, 5, 2, 7, 8, generator=generator)
    start = torch.tensor([0, 3, 1, 0, 6])
    place = torch.arange(7)
    mask = (place <= place[:, None]) & (place >= start[:, None, None])
    mask = (mask | torch.eye(7, dtype=torch.bool))[:, None]
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
