"""Kascade: anchors, the head map, and how both are fitted."""

import itertools

import pytest
import torch
from policy_cases import LAYOUT, look_at, prompts, tiny_model, tokens, view_of

import deltadecode as dd
from deltadecode.errors import PolicyError
from deltadecode.lab.policies import make_policy
from deltadecode.lab.policies.kascade import Kascade
from deltadecode.lab.policies.kascade_fit import (
    Development,
    KascadeFit,
    best_anchors,
    similarities,
)


def weights_like(view, *heads):
    """Logits [1, Hkv, G, slots] whose softmax is proportional to the weights of query heads."""
    return look_at(view, torch.tensor(heads).clamp(min=1e-9).log().view(1, 2, 2, -1))


def test_anchors_choose_for_each_kv_head_and_others_take_the_mapped_head(tmp_path):
    view = view_of([6], slots=6)
    file = tmp_path / "fit.json"
    maps = ((0, 1), (1, 0), (0, 1), (1, 1), (0, 1), (0, 1))
    KascadeFit((0, 2), maps).save(file)
    policy = Kascade(LAYOUT, budget=2, fit=str(file))
    # Summed over the two query heads of each KV head; their largest weights are elsewhere.
    layer = weights_like(
        view,
        [0.4, 0.3, 0.0, 0.3, 0.0, 0.0],
        [0.0, 0.3, 0.2, 0.3, 0.2, 0.0],
        [0.0, 0.0, 0.0, 0.1, 0.2, 0.7],
        [0.0, 0.0, 0.0, 0.1, 0.2, 0.7],
    )
    assert policy.select(0, layer, view) is None  # layer 0 reads everything, and chooses
    read = policy.select(1, layer, view)
    assert tokens(read, view, kv_head=0) == [4, 5] and tokens(read, view, kv_head=1) == [1, 3]
    flat = weights_like(view, *[[0.3, 0.3, 0.1, 0.1, 0.1, 0.1]] * 2, *[[0.1] * 4 + [0.3] * 2] * 2)
    own = policy.select(2, flat, view)  # an anchor reads what it chose
    assert tokens(own, view, kv_head=0) == [0, 1] and tokens(own, view, kv_head=1) == [4, 5]
    read = policy.select(3, layer, view)
    assert tokens(read, view, kv_head=0) == tokens(read, view, kv_head=1) == [4, 5]


def test_padding_is_not_chosen():
    view = view_of([8, 3], slots=8)
    policy = Kascade(LAYOUT, budget=2, layers=(0,))
    policy.select(0, look_at(view, torch.zeros(2, 2, 2, 8)), view)
    assert tokens(policy.select(1, look_at(view), view), view, row=1) == [0, 1]


def test_similarity_is_the_weight_that_a_head_finds_on_anothers_tokens():
    torch.manual_seed(0)
    weights = [torch.rand(2, 5, 12).softmax(dim=2) for _ in range(3)]
    found = similarities(weights, k=4)
    for a, b, i, j in itertools.product(range(3), range(3), range(2), range(2)):
        if b < a:
            assert found[a, b, i, j] == 0
            continue
        least = 1.0
        for query in range(5):
            row, other = weights[b][i, query], weights[a][j, query]
            served = sum(row[t] for t in other.topk(4).indices)
            least = min(least, float(served / row.topk(4).values.sum()))
        assert float(found[a, b, i, j]) == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_anchors_are_the_best_of_all_choices(count):
    table = torch.rand(7, 7, generator=torch.Generator().manual_seed(count))

    def total(anchors):
        return sum(float(table[max(a for a in anchors if a <= b), b]) for b in range(7))

    choices = [(0, *rest) for rest in itertools.combinations(range(1, 7), count - 1)]
    assert tuple(best_anchors(table, count)) == max(choices, key=total)


def test_it_is_fitted_to_the_first_prompt_without_a_trace_in_the_model(tmp_path):
    model, (ids, _) = tiny_model(), prompts([40])
    policy = make_policy("kascade:anchors=3", model, 8)
    with policy.decoding(model):
        cache = dd.DeltaCache(model.config)
        model.generate(ids, max_new_tokens=3, do_sample=False, past_key_values=cache)
    assert len(policy.fit.anchors) == 3 and policy.fit.anchors[0] == 0
    assert all(heads == (0, 1) for heads in (policy.fit.heads[a] for a in policy.fit.anchors))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    policy.fit.save(tmp_path / "fit.json")
    again = make_policy(f"kascade:fit={tmp_path / 'fit.json'}", model, 8)
    assert again.fit == policy.fit


@torch.no_grad()
def test_importance_is_how_far_attention_turns_the_residual_stream():
    model, (ids, _), changes = tiny_model(), prompts([12]), []
    model.model.layers[3].self_attn.o_proj.weight.zero_()
    model.model.layers[2].self_attn.o_proj.register_forward_hook(
        lambda module, args, output: changes.append(output)
    )
    development = Development(model, range(6), k=4)
    with development.watching():
        before = model(ids, output_hidden_states=True).hidden_states[2]
    same = torch.nn.functional.cosine_similarity(before, before + changes[0], dim=2).mean()
    assert development._importance[3] == pytest.approx(0.0, abs=1e-6)
    assert development._importance[2] == pytest.approx(1 - float(same), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("anchors=0", "anchors of policy 'kascade' must be 1 to 6, got 0"),
        ("anchors=7", "must be 1 to 6, got 7"),
        ("layers=2+:fit=file", "takes layers or a fit, not both"),
        ("fit=no/file", "cannot read the fit 'no/file' of policy 'kascade'"),
        ("layers=0+9", "must be full-attention layers, got 9"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, words):
    with pytest.raises(PolicyError, match=words):
        make_policy(f"kascade:{options}", tiny_model(), 20)


def test_a_fit_of_another_model_and_rows_without_a_fit_are_refused(tmp_path):
    KascadeFit((0,), ((0,),)).save(tmp_path / "fit.json")
    with pytest.raises(PolicyError, match="is not of 6 layers with 2 KV heads"):
        Kascade(LAYOUT, 20, fit=str(tmp_path / "fit.json"))
    view = view_of([6], slots=6)
    with pytest.raises(PolicyError, match="has no anchors yet"):
        Kascade(LAYOUT, 20).select(0, look_at(view), view)
