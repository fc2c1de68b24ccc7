"""Losses with the sinks treated, against one masked pass of eager attention."""

import math

import pytest
import torch
from inspection_models import FAMILIES, make, prompt
from test_inspection_pages import config_for

from deltadecode.config import DeltaConfig
from deltadecode.lab.inspection.removal import (
    FACTORS,
    DeltaScaled,
    DeltaSinkless,
    DeltaWithout,
    Factor,
    FullScaled,
    FullWithout,
    Treatment,
    losses,
    treatments,
)
from deltadecode.lab.policies.base import Layout, View
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
    tried = [Treatment("removal", "", policy) for policy in policies]
    return list(losses(model, ids + continuation[0].tolist(), len(ids), tried))


def masked_perplexity(model, ids, continuation, hidden, heads=None, factor=1.0):
    """One pass whose queries from the prompt's end on do not see the hidden tokens.

    And which weigh the first token by a factor in some heads, of every full-attention layer.
    """
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
        if kind == "full_attention" and heads is not None:
            masks[kind] = masks[kind].repeat(1, len(heads), 1, 1)
            masks[kind][:, heads, PROMPT:, 0] += math.log(factor)
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
    layout, cfg, plan = parts(case[0], budget_pages=budget)
    reads = {}

    class Spy(DeltaWithout):
        def select(self, layer, look, view):
            mask = super().select(layer, look, view)
            if mask is not None:
                reads[layer] = (mask & view.exists[:, None, None])[:, 0, 0]
            return mask

    policy = Spy(layout, cfg.page_size * budget, cfg, plan, range(2))
    run(case, policy)
    assert sorted(reads) == [
        i for i, layer in enumerate(layout.layers) if plan.role(layer) == "sparse"
    ]
    for masks in reads.values():
        assert len(masks) == STEPS - 1  # one a decode step
        for step, mask in enumerate(masks):
            n = PROMPT + step + 1
            assert not mask[: 2 * PAGE].any()
            missing = -n % PAGE
            assert mask.sum() == min(budget * PAGE - missing, n - 2 * PAGE)


def test_the_page_of_the_new_token_is_always_read():
    policy = FullWithout(Layout((0,), 1, 1), PAGE, range(2))

    view = View(torch.zeros(1, dtype=torch.int64), torch.tensor([5]), 6, 0, False)
    mask = policy.select(0, None, view)
    assert mask[0, 0, 0].tolist() == [False] * 4 + [True] * 2


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_a_factor_on_the_first_token_is_a_bias_of_the_mask(case, factor):
    model = case[0]
    layout = Layout.of(model)
    some = torch.zeros(len(layout.layers), layout.query_heads, dtype=torch.bool)
    some[:, 1] = True
    (found,) = run(case, FullScaled(layout, Factor(factor, some)))
    expected = masked_perplexity(*case, [], some[0], factor)
    assert found.perplexity == pytest.approx(expected, rel=1e-4)
    assert abs(found.perplexity / masked_perplexity(*case, []) - 1) > 1e-4


def test_a_factor_of_one_changes_nothing(case):
    layout, cfg, plan = parts(case[0])
    everywhere = torch.ones(len(layout.layers), layout.query_heads, dtype=torch.bool)
    budget = cfg.page_size * cfg.budget_pages
    same, other, delta = run(
        case,
        DeltaScaled(layout, budget, cfg, plan, Factor(1.0, everywhere)),
        DeltaScaled(layout, budget, cfg, plan, Factor(8.0, everywhere)),
        Delta(layout, budget, cfg, plan),
    )
    assert same.nll == pytest.approx(delta.nll, rel=1e-5)
    assert same.kl == pytest.approx(delta.kl, rel=1e-3, abs=1e-6)
    assert abs(other.nll - delta.nll) > 1e-4


def test_scores_without_the_sink_let_every_head_speak():
    """Head 0 spends all but a little on token 0, and the little on page 2; head 1 is spread out."""
    cfg = DeltaConfig(page_size=2, budget_pages=3, recent_pages=1, sink_pages=1, dense_layers=(),
                      delta_layers=(0,))  # fmt: skip
    policy = DeltaSinkless(Layout((0, 1), 2, 1), 6, cfg, cfg.layer_plan(2))

    class Attention:
        weights = torch.tensor([
            [0.96, 0.0, 0.0, 0.0, 0.04, 0.0, 0.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.3, 0.0, 0.1, 0.0, 0.1, 0.2, 0.2, 0.1],
        ])[None, None]  # fmt: skip

    view = View(torch.zeros(1, dtype=torch.int64), torch.tensor([9]), 10, 0, False)
    assert policy._choose(Attention, view).nonzero()[:, 2].tolist() == [0, 2, 4]
    plain = super(DeltaSinkless, policy)._choose(Attention, view)
    assert plain.nonzero()[:, 2].tolist() == [0, 1, 4]


def test_treatments_take_the_first_pages_and_a_control():
    layout = Layout((0, 1, 2), 4, 2)
    cfg = DeltaConfig(page_size=4, budget_pages=6, recent_pages=2, sink_pages=2, dense_layers=(),
                      delta_layers=(0,))  # fmt: skip
    heads = torch.zeros(3, 4, dtype=torch.bool)
    tried = treatments(layout, cfg, cfg.layer_plan(3), 80, heads)
    found = {each.name: each.policy for each in tried}
    assert tried[0].name == "full attention"
    assert found["DELTA, sink pages masked out"].hidden == range(2)
    assert found["full attention, sink pages masked out"].hidden == range(2)
    assert found["full attention, middle pages masked out (control)"].hidden == range(10, 12)
    assert found["DELTA, page scores without the sink"].cfg.sink_pages == 2
    forced = [each for each in tried if each.group == "sink_pages"]
    assert [each.policy.cfg.sink_pages for each in forced] == [0, 1, 2]  # no room for 4
    kinds = {(each.tags["under"], each.tags["heads"]) for each in tried if each.group == "factors"}
    assert kinds == {("full attention", "all"), ("DELTA", "all"), ("full attention", "without")}
    heads[1, 2] = True
    more = treatments(layout, cfg, cfg.layer_plan(3), 80, heads)
    assert len(more) == len(tried) + len(FACTORS)
    tight = DeltaConfig(page_size=4, budget_pages=3, recent_pages=2, sink_pages=0, dense_layers=(),
                        delta_layers=(0,))  # fmt: skip
    forced = treatments(layout, tight, tight.layer_plan(3), 80, heads)
    assert [each.tags["sink_pages"] for each in forced if each.group == "sink_pages"] == [0]
