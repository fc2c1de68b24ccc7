"""What drafts read in lossless mode: the copy of the selected pages, token by token (R12)."""

import pytest
import torch
from hf_tiny import small_config

from deltadecode.engines.transformers.held import Held, Part
from deltadecode.engines.transformers.rows import group_rows
from deltadecode.ops import select_pages

LAYERS, HEADS, SLOTS, DIM, DRAFTS = 3, 2, 39, 4, 5
# As the tests' cache would lay them out: a whole row, padded ones, one within the budget of 20
# tokens, and one with padding in its middle.
LENGTHS = {
    "equal": [(0, 39), (0, 39)],
    "padded": [(0, 39), (9, 39), (0, 39)],
    "short": [(0, 39), (22, 39), (3, 39)],
    "gaps": [(0, 39), (2, 39, 11, 14)],
}


def batch(case):
    """Mask [B, 1, 1, slots] of a case."""
    mask = torch.zeros(len(LENGTHS[case]), 1, 1, SLOTS, dtype=torch.bool)
    for row, (start, end, *gap) in enumerate(LENGTHS[case]):
        mask[row, ..., start:end] = True
        if gap:
            mask[row, ..., slice(*gap)] = False
    return mask


def cache(rows, room):
    """Keys that say row, head and slot, and a larger buffer behind them."""
    row, head, slot = torch.meshgrid(
        torch.arange(rows), torch.arange(HEADS), torch.arange(SLOTS + room), indexing="ij"
    )
    states = (row * 10_000.0 + head * 1_000 + slot)[..., None].repeat(1, 1, 1, DIM)
    states[:, :, SLOTS:] = torch.nan
    return states[:, :, :SLOTS]


def expected(slots, scores, cfg):
    """Slots that a draft reads of a row, by the definition of rule 12."""
    lengths = torch.tensor([len(slots)], dtype=torch.int32)
    ids, counts = select_pages(scores[None], lengths, cfg, backend="reference")
    pages = set(ids[0, : counts[0]].tolist())
    pages.add(len(slots) // cfg.page_size)  # the next token's
    return [slot for place, slot in enumerate(slots) if place // cfg.page_size in pages]


@pytest.mark.parametrize("changes", [{}, {"recent_pages": 0, "sink_pages": 0}])
@pytest.mark.parametrize("rejected", [0, 1, 3])  # leaves 39, 38 and 36 tokens: pages of 4
@pytest.mark.parametrize("room", [0, 64])
@pytest.mark.parametrize("case", LENGTHS)
def test_rule12_drafts_read_the_selected_pages_and_the_new_tokens(case, room, rejected, changes):
    cfg, mask = small_config(**changes), batch(case)
    key = cache(len(mask), room)
    value = key + 0.5
    groups = [group.first_tokens(group.length - rejected) for group in group_rows(mask, key)]
    scores = torch.rand(LAYERS, len(mask), -(-SLOTS // cfg.page_size))
    parts = [Part.of(group, scores[:, list(group.members)], cfg) for group in groups]
    assert any(part.pages is not None for part in parts)
    end = SLOTS - rejected
    for layer in range(LAYERS):
        held = Held(parts, layer, key, value, cfg.page_size, DRAFTS)
        for draft in range(DRAFTS):
            new = torch.full((len(mask), HEADS, 1, DIM), -1.0 - draft)
            keys, values, seen = held.append(new, new - 0.5)
            total = 0
            for row in range(len(mask)):
                slots = mask[row, 0, 0, :end].nonzero()[:, 0].tolist()
                read = expected(slots, scores[layer, row], cfg)
                total += len(read) + draft + 1
                chosen = slice(None) if seen is None else seen[row, 0, 0]
                for head in range(HEADS):
                    of_cache = key[row, head, read, 0].tolist()
                    fresh = [-1.0 - number for number in range(draft + 1)]
                    assert keys[row, head, chosen, 0].tolist() == of_cache + fresh
                    got = values[row, head, chosen, 3]
                    assert got.tolist() == [number + 0.5 for number in of_cache] + [
                        number - 0.5 for number in fresh
                    ]
            assert keys.isfinite().all() and values.isfinite().all()
            assert held.tokens == total
