"""Random Attention: what is generated goes at random; the prompt and recent tokens stay."""

import itertools

import pytest
import torch
from policy_cases import LAYOUT, look_at, tokens, view_of

from deltadecode.errors import PolicyError
from deltadecode.lab.policies.base import Scores
from deltadecode.lab.policies.random_attention import RandomAttention


def decoded(policy, lengths, steps, row=0):
    """Tokens that a row reads at each step, by KV head."""
    slots = max(lengths)
    zeros = torch.zeros(len(lengths), 2, slots, 4)
    policy.prefill(0, zeros, zeros, Scores(1.0), view_of(lengths, slots, step=-1))
    reads = []
    for step in range(steps):
        view = view_of([n + step + 1 for n in lengths], slots + step + 1, prompt=lengths, step=step)
        key = torch.zeros(len(lengths), 2, view.slots, 4)
        read = policy.select(0, look_at(view, key=key), view)
        reads.append([tokens(read, view, row, kv_head=head) for head in range(2)])
        policy.observe(0, torch.zeros(len(lengths), 2, 2, view.slots), view)
    return reads


def test_the_prompt_and_recent_tokens_stay_and_the_budget_holds():
    reads = decoded(RandomAttention(LAYOUT, budget=24, recent=4), [12], steps=60)
    for step, heads in enumerate(reads):
        for read in heads:
            assert read[:12] == list(range(12))
            assert read[-4:] == list(range(step + 9, step + 13))
            assert len(read) == min(13 + step, 24)
    gone = [set(a) - set(b) for (a, _), (b, _) in itertools.pairwise(reads)]
    assert all(len(each) <= 1 for each in gone)
    assert any(first != second for first, second in reads)  # every head draws for itself


def test_what_goes_does_not_hang_on_age_alone():
    """Each token but the fixed ones can go at each step: some that go are younger than others."""
    reads = decoded(RandomAttention(LAYOUT, budget=40, recent=2), [4], steps=200)
    places = []
    for (before, _), (after, _) in itertools.pairwise(reads):
        for token in set(before) - set(after):
            places.append(before[4:-2].index(token) / len(before[4:-2]))
    assert len(places) > 150
    assert 0.4 < sum(places) / len(places) < 0.6
    assert min(places) < 0.1 and max(places) > 0.9


def test_draws_do_not_depend_on_the_batch_but_on_the_seed():
    make = lambda seed=0: RandomAttention(LAYOUT, budget=24, recent=4, seed=seed)  # noqa: E731
    assert decoded(make(), [15, 9], 40, row=1) == decoded(make(), [9], 40)
    assert decoded(make(), [9], 40) != decoded(make(1), [9], 40)


def test_a_prompt_past_the_budget_is_refused_or_drawn_from():
    policy = RandomAttention(LAYOUT, budget=24, recent=4)
    with pytest.raises(PolicyError, match="one of 30 tokens needs 36"):
        decoded(policy, [30], 1)
    reads = decoded(RandomAttention(LAYOUT, budget=24, recent=4, keep_prompt=0), [30], steps=3)
    assert all(len(read) == 24 for heads in reads for read in heads)
    assert reads[0][0][-5:] == [26, 27, 28, 29, 30] and reads[0][0] != reads[0][1]
