"""Perplexity without sink pages, against one masked pass of eager attention."""

import math

import pytest
import torch
from inspection_models import FAMILIES, make, prompt
from test_inspection_pages import Tokenizer, config_for

from deltadecode.config import DeltaConfig
from deltadecode.lab.inspection.removal import DeltaWithout, FullWithout, remove, treatments
from deltadecode.lab.policies.base import Layout
from deltadecode.lab.policies.delta import Delta

PROMPT, STEPS, PAGE = 40, 10, 4


@pytest.fixture(scope="module", params=["llama", "learned", *FAMILIES])
def case(request):
    model = make(request.param)
    ids = prompt(model, PROMPT)
    # Not what it would write itself: agreement and perplexity then have something to say.
    continuation = prompt(model, PROMPT + STEPS)[:, PROMPT:]
    return model, ids[0].tolist(), continuation


def run(case, *policies):
    model, ids, continuation = case
    named = [(str(place), policy) for place, policy in enumerate(policies)]
    return list(remove(model, Tokenizer(), ids, continuation, named))


def masked_perplexity(model, ids, continuation, hidden):
    """One pass whose queries from the prompt's end on do not see the hidden tokens."""
    text = torch.tensor([ids + continuation[0].tolist()])
    n = text.shape[1]
    masks = {}
    for kind in ("full_attention", "sliding_attention"):
        seen = torch.ones(n, n).tril().bool()
        if kind == "sliding_attention":
            seen &= ~torch.ones(n, n).tril(-model.config.sliding_window).bool()
        else:
            seen[PROMPT:, hidden] = False
        masks[kind] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        if not getattr(model.config, "sliding_window", None):
            break
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = model(text, attention_mask=masks if len(masks) > 1 else masks["full_attention"])
    scores = logits.logits[0, PROMPT:-1].log_softmax(dim=1)
    return math.exp(-scores.gather(1, text[0, PROMPT + 1 :, None]).mean())


def test_full_attention_without_pages_is_a_masked_pass(case):
    model = case[0]
    layout = Layout.of(model)
    policies = [FullWithout(layout, PAGE, range(*pages)) for pages in ((0, 0), (0, 1), (3, 5))]
    found = run(case, *policies)
    for each, hidden in zip(found, ([], range(4), range(12, 20)), strict=True):
        expected = masked_perplexity(*case, list(hidden))
        assert each.perplexity == pytest.approx(expected, rel=1e-4)
    assert abs(found[1].perplexity / found[0].perplexity - 1) > 1e-2


def parts(model, **changes):
    layout, cfg = Layout.of(model), config_for(model, sink_pages=0, **changes)
    return layout, cfg, cfg.layer_plan(model.config.num_hidden_layers, layout.layers)


def test_delta_without_no_page_is_delta(case):
    layout, cfg, plan = parts(case[0])
    budget = cfg.page_size * cfg.budget_pages
    ours, delta = run(
        case, DeltaWithout(layout, budget, cfg, plan, range(0)), Delta(layout, budget, cfg, plan)
    )
    assert ours.perplexity == pytest.approx(delta.perplexity, rel=1e-5)


@pytest.mark.parametrize("budget", [5, 60])
def test_sparse_layers_never_read_what_is_masked_out(case, budget):
    """Also within the budget, where DELTA reads everything."""
    model, ids, continuation = case
    layout, cfg, plan = parts(model, budget_pages=budget)
    reads = {}

    class Spy(DeltaWithout):
        def select(self, layer, look, view):
            mask = super().select(layer, look, view)
            if mask is not None:
                reads.setdefault(layer, []).append(mask[0, 0, 0].clone())
            return mask

    policy = Spy(layout, cfg.page_size * budget, cfg, plan, range(2))
    list(remove(model, Tokenizer(), ids, continuation, [("spy", policy)]))
    assert sorted(reads) == [
        i for i, layer in enumerate(layout.layers) if plan.role(layer) == "sparse"
    ]
    for masks in reads.values():
        assert len(masks) == STEPS - 1
        for step, mask in enumerate(masks):
            n = PROMPT + step + 1
            assert not mask[: 2 * PAGE].any()
            missing = -n % PAGE
            assert mask.sum() == min(budget * PAGE - missing, n - 2 * PAGE)


def test_the_page_of_the_new_token_is_always_read():
    policy = FullWithout(Layout((0,), 1, 1), PAGE, range(2))

    class View:
        position = torch.arange(6)[None]

    mask = policy.select(0, None, View())
    assert mask[0, 0, 0].tolist() == [False] * 4 + [True] * 2


def test_treatments_take_the_first_pages_and_a_control():
    layout = Layout((0, 1, 2), 4, 2)
    cfg = DeltaConfig(page_size=4, budget_pages=6, recent_pages=2, sink_pages=2, dense_layers=(),
                      delta_layers=(0,))  # fmt: skip
    found = dict(treatments(layout, cfg, cfg.layer_plan(3), 80))
    assert found["DELTA, sink pages forced in"].cfg.sink_pages == 2
    assert found["DELTA, sink pages left to selection"].cfg.sink_pages == 0
    assert found["DELTA, sink pages masked out"].hidden == range(2)
    assert found["full attention, sink pages masked out"].hidden == range(2)
    assert found["full attention, middle pages masked out (control)"].hidden == range(10, 12)
    tight = DeltaConfig(page_size=4, budget_pages=3, recent_pages=2, dense_layers=(),
                        delta_layers=(0,))  # fmt: skip
    assert len(treatments(layout, tight, tight.layer_plan(3), 80)) == 5
