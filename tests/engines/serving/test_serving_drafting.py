"""Which pages drafts read: those of the rules, worked out slowly (R12)."""

import numpy as np
import pytest
import torch

from deltadecode.config import DeltaConfig
from deltadecode.engines.serving.drafting import DraftPages, Worth
from deltadecode.engines.serving.settings import ServingSettings

CPU = torch.device("cpu")


def pages_of(pages, layer, row):
    return pages.ids[layer, row, : pages.counts[layer, row]].tolist()


def draft(pages, positions, place):
    """Begin drafts behind positions, None for rows without, and count the ``place``-th of them."""
    rows = [0 if each is None else each for each in positions]
    rows += [0] * (pages.rows - len(rows))
    lengths = [0 if each is None else each + 1 + place for each in positions]
    lengths += [0] * (pages.rows - len(lengths))
    pages.begin(torch.tensor(rows))
    pages.count(torch.tensor(lengths, dtype=torch.int32))


@pytest.mark.parametrize("drafts", [1, 4, 16])
@pytest.mark.parametrize("recent", [0, 3])
def test_rule12_selected_pages_and_all_that_is_new(drafts, recent):
    cfg = DeltaConfig(8, 6, recent, 1, (), (0,))
    rng = np.random.default_rng(drafts)
    for _ in range(60):
        verified = int(rng.integers(1, 200))
        rejected = int(rng.integers(0, min(drafts, verified - 1) + 1))
        count = -(-verified // 8)
        chosen = [
            sorted(rng.choice(count, min(6, count), replace=False).tolist()) for _ in range(2)
        ]
        pages = DraftPages(cfg, 2, 3, drafts, 256, CPU)
        for layer, ids in enumerate(chosen):
            row = torch.tensor([ids + [-1] * (6 - len(ids))], dtype=torch.int32)
            pages.layer(layer).keep(row, torch.tensor([verified], dtype=torch.int32))
        position, place = verified - rejected, int(rng.integers(0, drafts))
        draft(pages, [position, None], place)
        for layer, ids in enumerate(chosen):
            older = [page for page in ids if page < position // 8]
            new = list(range(position // 8, (position + place) // 8 + 1))
            assert pages_of(pages, layer, 0) == older + new
            assert pages_of(pages, layer, 1) == []


def test_rule12_a_row_that_has_selected_nothing_reads_its_sinks_and_its_newest_pages():
    cfg = DeltaConfig(8, 6, 2, 1, (), (0,))
    pages = DraftPages(cfg, 1, 4, 4, 256, CPU)
    draft(pages, [100, 17, 40], 3)
    assert pages_of(pages, 0, 0) == [0, *range(7, 13)]
    assert pages_of(pages, 0, 1) == [0, 1, 2]
    assert pages_of(pages, 0, 2) == [0, 1, 2, 3, 4, 5]


def test_rule12_a_selection_is_for_the_drafts_behind_it_only():
    cfg = DeltaConfig(8, 3, 1, 0, (), (0,))
    pages = DraftPages(cfg, 1, 1, 2, 256, CPU)
    row = torch.tensor([[2, 5, 12]], dtype=torch.int32)
    pages.layer(0).keep(row, torch.tensor([104], dtype=torch.int32))
    draft(pages, [104], 0)
    assert pages_of(pages, 0, 0) == [2, 5, 12, 13]
    draft(pages, [106], 0)
    assert pages_of(pages, 0, 0) == [10, 11, 12, 13]


def test_rule4_a_share_of_the_pages_has_columns_for_all_it_may_select():
    cfg = DeltaConfig(8, 4, 1, 1, (), (0,), budget_share=0.5)
    pages = DraftPages(cfg, 1, 1, 4, 256, CPU)
    keep = pages.layer(0).keep
    length = torch.tensor([256], dtype=torch.int32)
    keep(torch.arange(0, 32, 2, dtype=torch.int32)[None], length)
    # A narrower table of a CPU: what was there before is gone.
    keep(torch.tensor([[0, 3, 5, 6]], dtype=torch.int32), torch.tensor([60], dtype=torch.int32))
    draft(pages, [60], 0)
    assert pages_of(pages, 0, 0) == [0, 3, 5, 6, 7]


def worth(min_tokens=1024, weights=1000, drafts=4):
    cfg = DeltaConfig(16, 64, 8, 1, (), (0,))
    return Worth(ServingSettings(cfg, cfg.layer_plan(4), min_tokens=min_tokens), weights, 1, drafts)


def test_long_rows_draft_and_short_ones_do_not():
    assert worth().pays(np.array([60_000, 90]))
    assert not worth().pays(np.array([1024, 90]))
    # Little more than the budget, and more weights than cache: drafts cost what they save.
    assert not worth().pays(np.array([1500]))
    assert not worth(weights=10**6).pays(np.array([20_000]))


def test_a_user_may_say_from_where_on():
    assert worth(min_tokens=0).pays(np.array([1030]))
    assert not worth(min_tokens=0).pays(np.array([1000]))
    assert not worth(min_tokens=4000).pays(np.array([3999, 3999]))
    assert worth(min_tokens=4000).pays(np.array([4000, 10]))


def test_drafts_that_do_not_hold_end_and_get_another_try():
    one, rows = worth(), np.array([8000])
    assert one.pays(rows)
    steps = 0
    while one.pays(rows):
        one.measure([1])
        steps += 1
    assert 5 < steps < 200
    off = 0
    while not one.pays(rows):
        one.measure([])
        off += 1
    assert 0 < off < 1000
