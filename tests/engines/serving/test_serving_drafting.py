"""Which pages drafts read: those of the rules, worked out slowly (R12)."""

import functools

import numpy as np
import pytest
import torch

from deltadecode.config import DeltaConfig
from deltadecode.engines.serving import drafting
from deltadecode.engines.serving.drafting import (
    Acceptance,
    DraftPages,
    Worth,
    draft_choices,
    kept_tokens,
)
from deltadecode.engines.serving.settings import ServingSettings
from deltadecode.engines.serving.step import ForwardPass
from deltadecode.ops import select_pages

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
            pages.layer(layer).keep(ForwardPass(), row, torch.tensor([verified], dtype=torch.int32))
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
    pages.layer(0).keep(ForwardPass(), row, torch.tensor([104], dtype=torch.int32))
    draft(pages, [104], 0)
    assert pages_of(pages, 0, 0) == [2, 5, 12, 13]
    draft(pages, [106], 0)
    assert pages_of(pages, 0, 0) == [10, 11, 12, 13]


def test_rule4_a_share_of_the_pages_has_columns_for_all_it_may_select():
    cfg = DeltaConfig(8, 4, 1, 1, (), (0,), budget_share=0.5)
    pages = DraftPages(cfg, 1, 1, 4, 256, CPU)
    keep = functools.partial(pages.layer(0).keep, ForwardPass())
    length = torch.tensor([256], dtype=torch.int32)
    keep(torch.arange(0, 32, 2, dtype=torch.int32)[None], length)
    # A narrower table of a CPU: what was there before is gone.
    keep(torch.tensor([[0, 3, 5, 6]], dtype=torch.int32), torch.tensor([60], dtype=torch.int32))
    draft(pages, [60], 0)
    assert pages_of(pages, 0, 0) == [0, 3, 5, 6, 7]


@pytest.mark.parametrize("alone", [(), (0,), (2,), (4,), (1, 2), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("layers_at_once", [1, 2, 3, 9])
@pytest.mark.parametrize(("rows", "width"), [(3, 30), (1, 33), (4, 17)])
def test_rule12_layers_that_select_together_select_what_each_would(
    monkeypatch, layers_at_once, alone, rows, width
):
    """Some of the layers may select by themselves, between the others."""
    cfg = DeltaConfig(4, 6, 2, 1, (), (0,))
    monkeypatch.setattr(drafting, "_SCORES", layers_at_once * rows * width)
    rng = torch.Generator().manual_seed(rows)
    pages = DraftPages(cfg, 5, 4, 4, 40 * 4, CPU)
    pages.keep(0, torch.full((5, 4, 6), 9, dtype=torch.int32), torch.full((4,), 77).int())
    forward, expected = ForwardPass(), []
    lens = torch.tensor([4 * width, 100, 0, 41][:rows], dtype=torch.int32).clamp(max=4 * width)
    for place in range(5):
        layer, scores = pages.layer(place), torch.rand(rows, width, generator=rng)
        expected.append(select_pages(scores, lens, cfg)[0])
        if place in alone:
            layer.keep(forward, expected[-1], lens)
            continue
        room = layer.room(forward, rows, width)
        assert room.shape == scores.shape and room.is_contiguous()
        # As kernels are compiled for.
        assert room.storage_offset() * room.element_size() % 16 == 0
        room.copy_(scores)
        layer.select(forward, lens)
    assert forward.waiting is None
    assert torch.equal(pages._selected[:, :rows], torch.stack(expected))
    assert (pages._lengths[:, :rows] == lens).all()
    # Rows of no batch keep what they had.
    assert (pages._selected[:, rows:] == 9).all() and (pages._lengths[:, rows:] == 77).all()


def worth(min_tokens=1024, weights=1000, drafts=4):
    cfg = DeltaConfig(16, 64, 8, 1, (), (0,))
    return Worth(ServingSettings(cfg, cfg.layer_plan(4), min_tokens=min_tokens), weights, 1, drafts)


def drafts(one, lengths, chance=0.9):
    lengths = np.array(lengths)
    return one.drafts(lengths, np.full(len(lengths), chance)) if one.may_pay(lengths) else 0


def test_long_rows_draft_and_short_ones_do_not():
    assert drafts(worth(), [60_000, 90]) == 4
    assert drafts(worth(), [1024, 90]) == 0
    # Little more than the budget, and more weights than cache: drafts cost what they save.
    assert drafts(worth(), [1500]) == 0
    assert drafts(worth(weights=10**6), [20_000]) == 0


def test_a_user_may_say_from_where_on():
    assert drafts(worth(min_tokens=0), [1030]) == drafts(worth(min_tokens=0), [8000], 0.1) == 4
    assert drafts(worth(min_tokens=0), [1000]) == 0
    assert drafts(worth(min_tokens=4000), [3999, 3999]) == 0
    assert drafts(worth(min_tokens=4000), [4000, 10]) == 4


def test_rule12_drafts_that_hold_less_often_are_fewer():
    assert [draft_choices(most) for most in (1, 2, 4, 16)] == [[1], [1, 2], [1, 2, 4], [4, 8, 16]]
    # A draft reads an eighth of what a verification does.
    found = [drafts(worth(), [8000], chance) for chance in (0.95, 0.7, 0.4, 0.05)]
    assert found == [4, 2, 1, 0]
    # Rows count alike.
    assert kept_tokens(2, np.array([0.5, 0.0])) == (1.75 + 1) / 2


def test_the_chance_is_a_request_s_own_and_fades():
    known = Acceptance()
    for _ in range(100):
        known.measure("good", 4, 5)
        known.measure("bad", 4, 1)
        known.measure("middle", 4, 3)  # two of three hold that were looked at
    good, bad, middle, new = known.of(["good", "bad", "middle", "new"])
    assert good > 0.99 and bad < 0.02 and 0.55 < middle < 0.75
    assert bad < new < good
    for _ in range(3000):
        known.rest()
    assert known.of(["good", "bad", "new"]) == pytest.approx(0.9, abs=0.05)
    known.forget(["good", "gone"])
    assert known.of(["good"]) == known.of(["new"])
