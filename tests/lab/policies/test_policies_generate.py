"""Every policy through ``model.generate``: batches, budgets, counts, and the model afterwards."""

import inspect
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from policy_cases import PLAN, prompts, tiny_model
from shared_kv_models import FULL_LAYERS

import deltadecode as dd
from deltadecode.errors import DeltaConfigError, PolicyError
from deltadecode.lab.evaluation.cells import Trace, make_cells
from deltadecode.lab.policies import POLICIES, Layout, make_policy, masked, parse_policy
from deltadecode.lab.policies.masked import MaskedPolicy

PLAN_OPTIONS = "page_size=4:recent_pages=2:sink_pages=1:dense_layers=0+:delta_layers=1+"
# Options that suit a tiny model, for policies whose defaults do not; pages are of 4 tokens in all.
OPTIONS = {
    "delta": PLAN_OPTIONS,
    "delta-variant": PLAN_OPTIONS,
    "tidal": "layers=1+3",
    "tidal-kv": "layers=1+3",
    "raas": "page_size=4:alpha=0.02",
    "raas-evict": "page_size=4:alpha=0.02",
    "snapkv": "window=4:kernel=3",
    "kascade": "layers=1+3",
    "lessismore": "layers=1+3:sinks=2",
    "omnikv": "layers=1+3:wait=0",
    "random-attention": "recent=4",
    "random-attention-evict": "recent=4",
}


def spec_of(name):
    has_pages = "page_size" in inspect.signature(POLICIES[name][0]).parameters
    options = OPTIONS.get(name, "page_size=4" if has_pages else "")
    return f"{name}:{options}" if options else name


SPECS = {name: spec_of(name) for name in POLICIES}
STEPS = 24
BUDGET = {"raas": 48, "random-attention": 48}  # their prompts stay
EVICTING = {"streaming", "h2o", "raas", "raas-evict", "snapkv", "keydiff", "random-attention",
            "random-attention-evict"}  # fmt: skip
# What `expected` says of a step's reads; an upper bound of all others.
EXACT = {"full", "delta", "quest-kv", "tidal-kv", "streaming", "h2o", "snapkv", "random",
         "kascade", "lessismore", "omnikv", "keydiff", "random-attention",
         "random-attention-evict"}  # fmt: skip
LAST_PAGE_IS_PARTIAL = {"oracle", "raas-evict", "raas", "delta-variant"}


def run(model, spec, budget, lengths, steps=STEPS):
    policy = make_policy(spec, model, budget)
    ids, mask = prompts(lengths)
    with policy.decoding(model):
        cache = (
            {} if spec.startswith("delta:") else {"past_key_values": dd.DeltaCache(model.config)}
        )
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=steps + 1, do_sample=False,
            return_dict_in_generate=True, output_logits=True, **cache,
        )  # fmt: skip
    new = out.sequences[:, ids.shape[1] :]
    return new, torch.stack(out.logits, 1), policy.counts(lengths, steps), policy


def alone(model, spec, budget, lengths, row):
    """The same row without the others: the same tokens, which depend on the batch's seed."""
    ids, _ = prompts(lengths)
    policy = make_policy(spec, model, budget)
    with policy.decoding(model):
        new = model.generate(
            ids[row : row + 1, max(lengths) - lengths[row] :], max_new_tokens=STEPS + 1,
            do_sample=False, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    return torch.stack(new.logits, 1)[0], policy.counts([lengths[row]], STEPS)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma4"])
def model(request):
    return tiny_model(request.param).double()


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama").double()


def test_every_policy_is_tried():
    assert set(SPECS) == set(POLICIES) >= set(OPTIONS)
    assert SPECS["quest"] == "quest:page_size=4" and SPECS["h2o"] == "h2o"


class Newest(MaskedPolicy):
    """A policy as a contributor writes it: the last tokens."""

    name = "newest"

    def __init__(self, layout, budget, sinks=0):
        super().__init__(layout, budget)
        self.sinks = sinks

    def select(self, layer, look, view):
        near = view.position >= view.lengths[:, None] - self.budget + self.sinks
        return (near | (view.position < self.sinks))[:, None, None]

    def expected(self, lengths, prompt):
        return np.minimum(lengths, self.budget)


def test_a_policy_needs_its_class_and_a_registration(llama, monkeypatch):
    """With four sinks it is StreamingLLM, under a name of its own, and evaluations take it."""
    monkeypatch.setitem(POLICIES, "newest", (Newest, {}))
    assert spec_of("newest") == "newest"
    ours = run(llama, "newest:sinks=4", 20, [33, 26])
    theirs = run(llama, "streaming", 20, [33, 26])
    torch.testing.assert_close(ours[1], theirs[1])
    np.testing.assert_allclose(ours[2].read, theirs[2].read)
    cells = make_cells(["newest"], [20], [0.5], llama, Trace(33, 33, STEPS))
    assert [cell.label for cell in cells] == ["newest 20", f"newest {cells[1].budget}"]
    with pytest.raises(PolicyError, match="unknown option 'pages=1' of policy 'newest'; there are"):
        make_policy("newest:pages=1", llama, 20)


def test_a_share_only_where_it_is_named(llama):
    """Of 9 to 15 pages, 60 percent are more than the budget of five."""
    named = f"{PLAN_OPTIONS}:budget_share=0.6"
    ours, variant = (run(llama, f"{name}:{named}", 20, [33]) for name in ("delta", "delta-variant"))
    torch.testing.assert_close(ours[1], variant[1], atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(ours[2].read, variant[2].read, rtol=1e-6)
    plain = run(llama, f"delta:{PLAN_OPTIONS}", 20, [33])
    assert (plain[2].read < ours[2].read).all()


@pytest.mark.parametrize("name", SPECS)
def test_a_row_of_a_batch_gives_what_it_gives_alone(model, name):
    lengths, budget = [33, 26, 33, 18], BUDGET.get(name, 20)
    _, logits, counts, _ = run(model, SPECS[name], budget, lengths)
    full = run(model, "full", 1, lengths)[1]
    # Random rows would agree with anything: the policy must make a difference.
    if name != "full":
        assert not torch.allclose(logits[:, 1:], full[:, 1:], atol=1e-3)
    for row in (1, 3):
        own, own_counts = alone(model, SPECS[name], budget, lengths, row)
        torch.testing.assert_close(logits[row], own, atol=1e-6, rtol=1e-6)
        for field in ("read", "kept", "metadata"):
            batch, single = getattr(counts, field)[:, row], getattr(own_counts, field)[:, 0]
            np.testing.assert_allclose(batch, single, rtol=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_a_budget_for_everything_gives_full_attention(model, name):
    lengths = [20, 13]
    _, logits, counts, _ = run(model, SPECS[name], 64, lengths)
    full = run(model, "full", 1, lengths)
    torch.testing.assert_close(logits, full[1], atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(counts.read, full[2].read)


@pytest.mark.parametrize("name", SPECS)
def test_reads_keep_to_the_budget_and_to_what_was_expected(llama, name):
    lengths, budget = [33, 26], BUDGET.get(name, 20)
    _, _, counts, policy = run(llama, SPECS[name], budget, lengths)
    tokens = np.asarray(lengths)[None] + np.arange(1.0, STEPS + 1)[:, None]
    for row, length in enumerate(lengths):
        expected = policy.expected(tokens[:, row], length)
        if name in EXACT:
            np.testing.assert_allclose(counts.read[:, row], expected, rtol=1e-6)
        elif name in LAST_PAGE_IS_PARTIAL:
            np.testing.assert_allclose(counts.read[:, row], expected, atol=4)
        else:
            assert (counts.read[:, row] <= expected + 1e-6).all()
    evicts = getattr(policy, "evicts", False)
    assert evicts or name not in EVICTING
    kept = counts.read if evicts else tokens
    np.testing.assert_allclose(counts.kept, kept, rtol=1e-6)


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_the_whole_prompt_votes_in_layers_that_reuse_keys(name):
    """Gemma 4's reusing layers see one query of a prompt unless they are asked for all."""
    model, seen = tiny_model("gemma4"), []
    policy = make_policy(SPECS[name], model, 20)
    ids, _ = prompts([33])
    policy.prefill = lambda layer, query, *rest: seen.append((layer, query.shape[2]))
    with policy.decoding(model):
        model.generate(ids, max_new_tokens=1, do_sample=False)
    assert seen == [(place, 33) for place in range(len(FULL_LAYERS))]
    assert not model._forward_pre_hooks


def test_a_model_whose_layers_see_parts_of_a_prompt_is_refused_in_one_line(monkeypatch):
    model = tiny_model("gemma4")
    monkeypatch.setattr(masked, "whole_prompt", lambda model: nullcontext())
    policy = make_policy("streaming", model, 20)
    with policy.decoding(model), pytest.raises(PolicyError, match="layer 5 sees one of 33"):
        model.generate(prompts([33])[0], max_new_tokens=2, do_sample=False)


def test_layers_with_heads_of_their_own_count_those_of_full_attention():
    layout = Layout.of(tiny_model("gemma4"))
    assert layout == Layout(FULL_LAYERS, query_heads=4, kv_heads=1)


def test_delta_counts_are_those_of_the_product(llama):
    lengths = [33, 26]
    cfg = PLAN
    ids, mask = prompts(lengths)
    dd.enable(llama, cfg)
    try:
        llama.generate(ids, attention_mask=mask, max_new_tokens=STEPS + 1, do_sample=False)
        attended = dd.stats(llama).attended_tokens
    finally:
        dd.disable(llama)
    counts = make_policy(SPECS["delta"], llama, 20).counts(lengths, STEPS)
    assert counts.read.sum() * 6 == pytest.approx(attended)


def test_the_variant_with_nothing_changed_is_delta(model):
    lengths = [33, 26]
    _, exact, counts, _ = run(model, SPECS["delta"], 20, lengths)
    _, variant, variant_counts, _ = run(model, SPECS["delta-variant"], 20, lengths)
    torch.testing.assert_close(variant, exact, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(variant_counts.read, counts.read, rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        "heads=mean",
        "heads=rms",
        "heads=two",
        "heads=kv",
        "accumulate=1",
        "per_layer=1",
        "refresh=4",
    ],
)
def test_a_variant_changes_something(llama, change):
    lengths = [33, 26]
    plan = PLAN_OPTIONS.replace("delta_layers=1+", "delta_layers=1+3")
    _, exact, counts, _ = run(llama, f"delta:{plan}", 20, lengths)
    _, variant, found, _ = run(llama, f"delta-variant:{plan}:{change}", 20, lengths)
    assert not torch.allclose(variant, exact, atol=1e-3)
    if change == "refresh=4":  # the Δ-layer reads less at three steps of four
        fresh = np.arange(STEPS) % 4 == 0
        np.testing.assert_allclose(found.read[fresh], counts.read[fresh], rtol=1e-6)
        assert found.read[~fresh].mean() < counts.read[~fresh].mean() - 0.5
    else:
        np.testing.assert_allclose(found.read, counts.read, rtol=1e-6)


def test_the_model_is_as_before(llama):
    ids, _ = prompts([20])
    before = llama.generate(ids, max_new_tokens=8, do_sample=False)
    policy = make_policy("streaming", llama, 8)
    with pytest.raises(RuntimeError, match="stop here"), policy.decoding(llama):
        assert llama.config._attn_implementation == "deltadecode_policy"
        raise RuntimeError("stop here")
    assert llama.config._attn_implementation == "sdpa"
    torch.testing.assert_close(llama.generate(ids, max_new_tokens=8, do_sample=False), before)


def test_a_prompt_comes_in_one_piece_and_padded_on_the_left(llama):
    ids, mask = prompts([20])
    with make_policy("streaming", llama, 8).decoding(llama):
        with pytest.raises(PolicyError, match="one piece"):
            llama.generate(ids, max_new_tokens=4, prefill_chunk_size=8, do_sample=False)
        mask[0, 5] = 0
        with pytest.raises(PolicyError, match="left only"):
            llama.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)


def test_sinks_and_soft_caps_enter_the_softmax():
    from deltadecode.lab.policies.base import Scores

    logits = torch.tensor([[[[[0.0, 1.0, 2.0]]]]])
    read = torch.tensor([True, False, True])
    weights = Scores(1.0, sinks=torch.tensor([1.0])).weights(logits, read)[0, 0, 0, 0]
    exp = [1.0, np.e**2, np.e]
    np.testing.assert_allclose(weights, [exp[0] / sum(exp), 0, exp[1] / sum(exp)], rtol=1e-6)
    q, k = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0)
    capped = Scores(0.5, softcap=2.0).logits(q, k)
    assert float(capped) == pytest.approx(2 * np.tanh(1.5))


@pytest.mark.parametrize(
    ("spec", "budget", "words"),
    [
        ("quset", 64, "unknown policy 'quset'; there are full, delta, quest"),
        ("quest:pages=3", 64, "unknown option 'pages=3' of policy 'quest'; there are page_size"),
        ("quest:page_size=16", 20, "it needs 2 pages of 16 tokens, 32"),
        ("streaming", 4, "it needs more than its 4 sinks"),
        ("snapkv", 32, "it needs more than its observation window of 32"),
        ("h2o", 3, "cannot keep to 3 tokens"),
        ("delta:page_size=16:recent_pages=8", 64, "it needs 10 pages of 16 tokens, 160"),
        ("delta:dense_layers=0+:delta_layers=1+9", 256, "delta_layers must be in 0..5"),
        ("tidal:layers=2+9", 64, "must be full-attention layers, got 9"),
        ("delta-variant:heads=min", 256, "must be max, mean, rms, two or kv, got 'min'"),
        ("quest:page_size=0", 64, "page_size of policy 'quest' must be at least 1"),
        ("quest:page_size=big", 64, "page_size of policy 'quest' must be a whole number"),
        ("streaming:sinks=-1", 64, "sinks of policy 'streaming' must be a whole number, 0 or more"),
        ("raas:alpha=little", 64, "alpha of policy 'raas' must be a number, 0 or more, got"),
        ("snapkv:kernel=4", 64, "needs an odd kernel and a window of 1 or more, got 4 and 32"),
        ("streaming", 0, "a budget must be at least 1 token, got 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(llama, spec, budget, words):
    with pytest.raises((PolicyError, DeltaConfigError)) as caught:
        make_policy(spec, llama, budget)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_are_numbers_words_and_layers():
    assert parse_policy("delta-variant:heads=mean:refresh=2:delta_layers=2+:dense_layers=+") == (
        "delta-variant",
        {"heads": "mean", "refresh": 2, "delta_layers": (2,), "dense_layers": ()},
    )
