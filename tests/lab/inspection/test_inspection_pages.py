"""Page maps, overlaps, drift and entropy, against eager maps and by hand."""

import base64

import numpy as np
import pytest
import torch
from inspection_models import FAMILIES, eager_maps, full_layers, make, prompt

from deltadecode import DeltaConfig
from deltadecode.errors import InspectionError
from deltadecode.lab.inspection.page import drawn_map
from deltadecode.lab.inspection.pages import PageMap
from deltadecode.lab.inspection.run import (
    continue_prompt,
    fit_config,
    inspect_text,
    stride_for,
)

PAGE, PROMPT, STEPS = 4, 40, 12


class Tokenizer:
    """As much of a tokenizer as generation asks for."""

    pad_token_id, eos_token_id = 0, None


def config_for(model, **changes):
    layers = full_layers(model)
    values = {"page_size": PAGE, "budget_pages": 5, "recent_pages": 2, "sink_pages": 1,
              "dense_layers": (), "delta_layers": (layers[0],)}  # fmt: skip
    return DeltaConfig(**{**values, **changes})


@pytest.fixture(scope="module", params=["llama", "learned", "gated", *FAMILIES])
def case(request):
    model = make(request.param)
    ids = continue_prompt(model, Tokenizer(), prompt(model, PROMPT)[0].tolist(), STEPS)
    return model, inspect_text(model, ids, PROMPT, config_for(model), loss_steps=0)


def rows(model, found):
    """Attention [layers, Hq, n] of the newest token of each observed decode step, from eager."""
    if type(model).__name__.startswith("Qwen3Next"):
        maps = eager_maps(model, torch.tensor([found.ids])).attentions
        maps = [each for each in maps if each is not None]
    else:
        maps = eager_maps(model, torch.tensor([found.ids])).attentions
    if len(maps) != len(full_layers(model)):
        maps = [maps[layer] for layer in full_layers(model)]
    lengths = [PROMPT + int(step) + 1 for step in found.pages.steps]
    return [torch.stack([each[0, :, n - 1, :n] for each in maps]) for n in lengths]


def test_page_masses_and_selections_are_those_of_eager_maps(case):
    model, found = case
    assert found.pages.steps.tolist() == list(range(STEPS - 1))
    for place, weights in enumerate(rows(model, found)):
        heads = weights.shape[1]
        n = weights.shape[2]
        pages = -(-n // PAGE)
        for layer in range(len(weights)):
            mass, scores = np.zeros(pages), np.zeros(pages)
            for token in range(n):
                mass[token // PAGE] += weights[layer, :, token].sum().item() / heads
                scores[token // PAGE] += weights[layer, :, token].max().item()
            np.testing.assert_allclose(found.pages.mass[place, layer, :pages], mass, atol=1e-4)
            assert not found.pages.mass[place, layer, pages:].any()
            forced = {0, pages - 1, pages - 2}
            free = sorted(set(range(pages)) - forced, key=lambda page: -scores[page])[:2]
            assert set(np.flatnonzero(found.pages.selected[place, layer])) == forced | set(free)
            assert set(np.flatnonzero(found.pages.chosen[place, layer])) == set(free)
            # With the sink page left to selection there is a place more for it.
            others = sorted(range(pages - 2), key=lambda page: -scores[page])[:3]
            assert found.pages.finds_first[place, layer] == (0 in others)


def test_captured_attention_is_that_of_eager_maps(case):
    model, found = case
    pages = found.pages
    expected = np.zeros((len(pages.mass[0]),) * 2)
    for place, weights in enumerate(rows(model, found)):
        mean = weights.mean(dim=1).double().numpy()
        for by in range(len(mean)):
            tokens = np.repeat(pages.selected[place, by], PAGE)[: mean.shape[1]]
            expected[by] += (mean * tokens).sum(axis=1) / mean.sum(axis=1)
    np.testing.assert_allclose(pages.captured(), expected / len(pages.steps), atol=1e-4)


def test_the_shift_is_that_of_eager_maps(case):
    model, found = case
    before, now = [], []
    for weights in rows(model, found):
        mean = weights.mean(dim=1).double()
        before, now = [*before, mean[:-1]], [*now, mean[1:]]
    cosines = [torch.cosine_similarity(*each, dim=1) for each in zip(before, now, strict=True)]
    shift = [each.rows.shift for each in found.measured.attention]
    np.testing.assert_allclose(shift[1:], 1 - torch.stack(cosines).mean(dim=0), atol=1e-4)
    assert shift[0] == 0


def test_entropy_is_that_of_eager_maps(case):
    model, found = case
    bits = []
    for weights in rows(model, found):
        shares = (weights / weights.sum(dim=2, keepdim=True)).double().numpy()
        logs = np.log2(shares, where=shares > 0, out=np.zeros_like(shares))
        bits.append(-(shares * logs).sum(axis=2))
    entropy = torch.stack([each.rows.entropy for each in found.measured.attention])
    np.testing.assert_allclose(entropy, np.mean(bits, axis=0), atol=1e-4)


def by_hand(chosen, steps=None):
    chosen = np.array(chosen, dtype=bool)
    steps = np.arange(len(chosen)) if steps is None else np.array(steps)
    return PageMap(2, steps, steps + 10, chosen.astype(np.float32), chosen, chosen, chosen[:, :, 0])


def test_overlap_by_hand():
    found = by_hand([[[1, 1, 0, 0], [0, 1, 1, 0]], [[1, 0, 0, 1], [1, 0, 0, 1]]])
    np.testing.assert_allclose(found.overlap(), [[1, 2 / 3], [2 / 3, 1]])


def test_drift_by_hand():
    found = by_hand([[[1, 1, 0]], [[1, 0, 1]], [[1, 1, 0]], [[1, 1, 0]]], steps=[0, 7, 14, 21])
    assert found.lags().tolist() == [0, 7, 14]
    # One step apart: 1/3, 1/3, 1; two apart: 1, 1/3.
    np.testing.assert_allclose(found.drift(0), [1, (1 / 3 + 1 / 3 + 1) / 3, (1 + 1 / 3) / 2])


def test_what_an_old_choice_still_holds_by_hand():
    # Pages of 2 tokens, the last one forced: of 8 tokens page 3, of 10 tokens page 4.
    chosen = np.array([[[1, 0, 0, 0, 0]], [[0, 1, 0, 0, 0]]], dtype=bool)
    selected = chosen | np.array([[[0, 0, 0, 1, 0]], [[0, 0, 0, 0, 1]]], dtype=bool)
    mass = np.array([[[0.5, 0.1, 0.1, 0.3, 0]], [[0.2, 0.3, 0.05, 0.05, 0.4]]], dtype=np.float32)
    found = PageMap(2, np.array([0, 2]), np.array([8, 10]), mass, selected, chosen,
                    chosen[:, :, 0])  # fmt: skip
    # Now: 0.5 + 0.3 and 0.3 + 0.4. Two steps later: page 0, and page 4, which is forced by then.
    np.testing.assert_allclose(found.held(0), [(0.8 + 0.7) / 2, 0.2 + 0.4], rtol=1e-6)
    # One of 3 and one of 4 pages at random.
    expected = ((1 / 3) / (2 - 1 / 3) + (1 / 4) / (2 - 1 / 4)) / 2
    assert found.chance() == pytest.approx(expected)


def test_steps_within_the_budget_decide_nothing():
    chosen = np.zeros((3, 2, 4), dtype=bool)
    chosen[2, :, 1] = True
    found = by_hand(chosen)
    assert found.over_budget.tolist() == [False, False, True]
    np.testing.assert_allclose(found.overlap(), np.ones((2, 2)))
    nothing = by_hand(np.zeros((3, 2, 4)))
    assert np.isnan(nothing.overlap()).all() and np.isnan(nothing.chance())
    assert nothing.lags().tolist() == nothing.drift(0).tolist() == nothing.held(0).tolist() == []


def test_a_text_that_ends_at_once_is_one_line():
    model = make("llama")
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    with pytest.raises(InspectionError, match="there is no decode step to look at"):
        continue_prompt(model, Tokenizer(), [3, 4, 5], 8)


def test_a_budget_that_covers_the_text_is_refused():
    model = make("llama")
    with pytest.raises(InspectionError, match=r"below the pages of the text's 40 tokens .* got 10"):
        inspect_text(model, list(range(2, 43)), 30, config_for(model, budget_pages=10))


def test_a_short_text_gets_a_budget_that_leaves_something_to_select():
    plan = DeltaConfig(page_size=16, budget_pages=64, recent_pages=8, sink_pages=0)
    assert fit_config(plan, 1000, 200) == plan
    fitted = fit_config(plan, 200, 112)  # 16 pages by half of its new tokens
    assert (fitted.budget_pages, fitted.recent_pages, fitted.sink_pages) == (4, 2, 0)
    assert fitted.delta_layers == plan.delta_layers
    with pytest.raises(InspectionError, match=r"needs 8 pages of 16 tokens .* got 20 tokens"):
        fit_config(plan, 20, 60)


@pytest.mark.parametrize(("steps", "page", "stride"), [(50, 8, 1), (512, 8, 7), (576, 7, 6)])
def test_strides_share_no_divisor_with_pages(steps, page, stride):
    assert stride_for(steps, page) == stride


def test_neighbours_are_put_together_in_a_map_that_is_too_wide_to_draw():
    pages = 2501  # three by three, the last one with a neighbour only
    mass = np.zeros((1, 1, pages), dtype=np.float32)
    mass[0, 0, [3, 4, 2500]] = 0.25, 0.25, 0.5
    selected = mass > 0.4
    found = drawn_map(PageMap(4, np.array([0]), np.array([4 * pages]), mass, selected, selected,
                              selected[:, :, 0]))  # fmt: skip
    assert found["shape"] == [1, 1, 834] and found["pooled"] == 3
    levels = np.frombuffer(base64.b64decode(found["levels"]), np.uint8)
    assert np.flatnonzero(levels).tolist() == [1, 833]
    np.testing.assert_allclose(10 ** (-5 * (1 - levels[[1, 833]] / 250)), 0.5, rtol=0.03)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(found["selected"]), np.uint8))
    assert np.flatnonzero(bits).tolist() == [833]
