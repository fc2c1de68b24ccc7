"""What each policy reads, on cases made by hand and against slow loops."""

import math
import random

import numpy as np
import pytest
import torch
from policy_cases import LAYOUT, look_at, tokens, view_of

from deltadecode.errors import PolicyError
from deltadecode.lab.policies.base import Layout, Scores
from deltadecode.lab.policies.h2o import H2O
from deltadecode.lab.policies.oracle import Oracle
from deltadecode.lab.policies.quest import Quest
from deltadecode.lab.policies.raas import RaaS
from deltadecode.lab.policies.random_pages import RandomPages
from deltadecode.lab.policies.snapkv import SnapKV
from deltadecode.lab.policies.streaming import Streaming
from deltadecode.lab.policies.tidal import Tidal

ONE = Layout(layers=(0,), query_heads=1, kv_heads=1)
SCORES = Scores(1.0)


def logits_of(weights):
    """Logits whose softmax is proportional to the weights; [slots] to [1, 1, 1, slots]."""
    return torch.tensor(weights, dtype=torch.float32).clamp(min=1e-9).log()[None, None, None]


def test_streaming_reads_its_sinks_and_its_window():
    view = view_of([12, 9, 3], slots=12)
    read = Streaming(LAYOUT, budget=7, sinks=2).select(0, look_at(view), view)
    assert tokens(read, view, 0) == [0, 1, 7, 8, 9, 10, 11]
    assert tokens(read, view, 1) == [0, 1, 4, 5, 6, 7, 8]
    assert tokens(read, view, 2) == [0, 1, 2]


def test_oracle_reads_the_pages_with_the_largest_summed_maximum():
    view = view_of([8], slots=8)
    # Pages of 2. On average page 0 is first, but no head weighs it most: the maxima decide.
    weights = torch.tensor(
        [[0.2, 0.2, 0.3, 0.3, 0.0, 0.0, 0.0, 0.0], [0.2, 0.2, 0.0, 0.0, 0.0, 0.0, 0.1, 0.5]]
    )
    logits = weights.clamp(min=1e-9).log()[None, None]
    read = Oracle(LAYOUT, budget=4, page_size=2).select(0, look_at(view, logits), view)
    assert tokens(read, view) == [2, 3, 6, 7]  # 0.6 and 0.6, against 0.4


def test_oracle_counts_pages_from_a_rows_own_first_token():
    view = view_of([8, 5], slots=8)
    logits = logits_of([0.0] * 8).repeat(2, 1, 1, 1)
    logits[1, ..., 3 + 2] = 5.0  # token 2 of a row of 5 stands on its page 1, tokens 2 and 3
    read = Oracle(LAYOUT, budget=2, page_size=2).select(0, look_at(view, logits), view)
    assert tokens(read, view, 1) == [2, 3]


def test_random_reads_the_recent_pages_and_does_not_depend_on_the_batch():
    policy = RandomPages(LAYOUT, budget=6, page_size=2, recent_pages=1)
    together, alone = view_of([20, 15], slots=20), view_of([15], slots=15)
    in_batch = tokens(policy.select(3, look_at(together), together), together, 1)
    assert in_batch == tokens(policy.select(3, look_at(alone), alone), alone)
    assert in_batch[-1] == 14 and len(in_batch) == 5  # the last page holds one token
    seen = set()
    for step in range(40):
        view = view_of([200 + step], slots=200 + step)
        seen.update(tokens(policy.select(0, look_at(view), view), view))
    assert len({token // 2 for token in seen}) > 60  # of 120: draws differ, and spread


@pytest.mark.parametrize("seed", range(8))
def test_quest_bounds_are_those_of_the_paper(seed):
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(2, 2, 11, 4, generator=generator)
    query = torch.randn(2, 4, 4, generator=generator)
    lengths = [11, 7]
    policy = Quest(LAYOUT, budget=4, page_size=2)
    before = view_of([8, 4], slots=8, step=-1)
    policy.prefill(2, torch.zeros(2, 4, 8, 4), key[:, :, :8], SCORES, before)
    for slots in (9, 10, 11):  # the last three keys come one by one
        view = view_of([slots, slots - 4], slots=slots, prompt=[8, 4])
        read = policy.select(2, look_at(view, query=query, key=key[:, :, :slots]), view)
    for row, length in enumerate(lengths):
        own = key[row, :, 11 - length :]
        for head in range(4):
            kv_head, q = head // 2, query[row, head]
            bounds = []
            for first in range(0, length, 2):
                page = own[kv_head, first : first + 2]
                bound = sum(
                    max(float(q[d] * page[:, d].min()), float(q[d] * page[:, d].max()))
                    for d in range(4)
                )
                bounds.append(bound)
            last = len(bounds) - 1
            best = max(range(last), key=lambda page: bounds[page])
            expected = [t for t in range(length) if t // 2 in (best, last)]
            assert tokens(read, view, row, kv_head, head % 2) == expected


def test_quest_kv_lets_the_heads_of_a_kv_head_choose_together():
    key = torch.zeros(1, 1, 9, 2)
    key[0, 0, 0] = torch.tensor([3.0, 0.0])
    key[0, 0, 4] = torch.tensor([0.0, 5.0])
    layout = Layout((0, 1, 2), 2, 1)
    query = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    view = view_of([9], slots=9, prompt=[8])
    picked = {}
    for shared in (0, 1):
        policy = Quest(layout, budget=4, page_size=2, shared=shared)
        policy.prefill(2, query, key[:, :, :8], SCORES, view_of([8], slots=8, step=-1))
        read = policy.select(2, look_at(view, query=query, key=key), view)
        picked[shared] = [tokens(read, view, head=head) for head in range(read.shape[2])]
    assert picked == {0: [[0, 1, 8], [4, 5, 8]], 1: [[4, 5, 8]]}


def test_quest_reads_everything_in_its_first_layers_and_reports_its_bounds():
    policy = Quest(LAYOUT, budget=4, page_size=2)
    view = view_of([9], slots=9)
    assert policy.select(0, look_at(view), view) is None
    assert policy.select(1, look_at(view), view) is None
    # 5 pages in 4 of 6 layers.
    assert policy.overhead(np.array([9.0])) == pytest.approx([5 * 4 / 6])


def test_tidal_chooses_tokens_per_query_head_and_reuses_them():
    view = view_of([6], slots=6)
    policy = Tidal(Layout((0, 1, 2, 3, 4, 5), 2, 1), budget=2, layers=(1, 4))
    first = torch.tensor([[[[5.0, 1, 4, 0, 0, 0], [0, 0, 0, 0, 3.0, 2]]]])
    second = torch.tensor([[[[0, 7.0, 0, 6.0, 0, 0], [0, 0, 0, 0, 3.0, 2]]]])
    per_layer = [first, first, second, second, second, first]
    read = [policy.select(i, look_at(view, x), view) for i, x in enumerate(per_layer)]
    assert [place for place, mask in enumerate(read) if mask is None] == [0, 1, 4]
    assert [tokens(read[2], view, head=head) for head in (0, 1)] == [[0, 2], [4, 5]]
    assert tokens(read[3], view) == [0, 2]
    assert tokens(read[5], view) == [1, 3]


def test_tidal_takes_layers_2_and_about_13_of_32_by_default():
    deep = Layout(tuple(range(32)), 4, 4)
    assert Tidal(deep, budget=8).selecting == [2, 13]


def test_tidal_kv_chooses_by_the_largest_weight_of_the_group():
    view = view_of([4], slots=4)
    # Token 0 is first on average and by its logits, but no head weighs it most.
    weights = torch.tensor([[0.45, 0.55, 0.0, 0.0], [0.45, 0.0, 0.0, 0.55]])
    logits = weights.clamp(min=1e-9).log()[None, None] + torch.tensor([[9.0], [0.0]])
    policy = Tidal(Layout((0, 1), 2, 1), budget=2, layers=(0,), shared=1)
    policy.select(0, look_at(view, logits), view)
    read = policy.select(1, look_at(view, logits), view)
    assert tokens(read, view) == [1, 3]


def test_tidal_takes_recent_tokens_and_sinks_from_the_budget_when_asked():
    view = view_of([8, 6], slots=8)
    logits = torch.tensor([0.0, 0, 0, 9, 1, 5, 2, 0]).expand(2, 1, 1, 8)
    policy = Tidal(Layout((0, 1), 1, 1), budget=4, layers=(0,), recent=2, sinks=1)
    policy.select(0, look_at(view, logits), view)
    read = policy.select(1, look_at(view, logits), view)
    assert [tokens(read, view, row) for row in (0, 1)] == [[0, 3, 6, 7], [0, 1, 4, 5]]
    with pytest.raises(PolicyError, match="more than 2 recent tokens and 1 sinks"):
        Tidal(LAYOUT, budget=3, recent=2, sinks=1)


def test_snapkv_keeps_its_window_and_pools_the_votes():
    # One head; the key of token 4 answers the window's queries.
    key = torch.zeros(1, 1, 12, 1)
    key[0, 0, 4] = 6.0
    key[0, 0, 10] = 9.0  # in the window, which lends nothing to its neighbour 9
    query = torch.ones(1, 1, 12, 1)
    view = view_of([12], slots=12, step=-1)
    policy = SnapKV(ONE, budget=5, window=2, kernel=3)
    policy.prefill(0, query, key, SCORES, view)
    later = view_of([14], slots=14, prompt=[12], step=1)
    read = policy.select(0, look_at(later), later)
    assert tokens(read, later) == [3, 4, 5, 10, 11, 12, 13]


def test_snapkv_hears_the_window_alone():
    key = torch.zeros(1, 1, 12, 2)
    key[0, 0, 2, 0], key[0, 0, 7, 1] = 9.0, 9.0
    query = torch.zeros(1, 1, 12, 2)
    query[0, 0, :10, 0] = 1.0  # all the others look at token 2, the last two at token 7
    query[0, 0, 10:, 1] = 1.0
    policy = SnapKV(ONE, budget=3, window=2, kernel=1)
    policy.prefill(0, query, key, SCORES, view_of([12], slots=12, step=-1))
    view = view_of([13], slots=13, prompt=[12])
    assert tokens(policy.select(0, look_at(view), view), view) == [7, 10, 11, 12]


def drive(policy, length, steps, pad, seed):
    """Run an evicting policy over random weights; yields what it reads, and the full weights."""
    generator = torch.Generator().manual_seed(seed)
    slots = length + pad
    view = view_of([slots, length], slots=slots, step=-1)
    query = torch.randn(2, 1, slots, 2, generator=generator)
    key = torch.randn(2, 1, slots, 2, generator=generator)
    policy.prefill(0, query, key, SCORES, view)
    yield query[1, 0, pad:], key[1, 0, pad:]
    for step in range(steps):
        slots += 1
        view = view_of([slots, slots - pad], slots=slots, prompt=[length + pad, length], step=step)
        logits = 3 * torch.randn(2, 1, 1, slots, generator=generator)
        attention = look_at(view, logits)
        read = policy.select(0, attention, view)
        weights, found = attention.weights_of(read), tokens(read, view, 1)
        policy.observe(0, weights, view)
        yield found, weights[1, 0, 0, pad:].tolist()


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("seed", range(4))
def test_h2o_evicts_the_least_accumulated_weight(pad, seed):
    budget, length = 8, random.Random(seed).choice([5, 12, 20])
    steps = drive(H2O(ONE, budget), length, 30, pad, seed)
    query, key = (states.double() for states in next(steps))
    sums = {}
    for token in range(length):
        row = [math.exp(float(query[token] @ key[other])) for other in range(token + 1)]
        for other, weight in enumerate(row):
            sums[other] = sums.get(other, 0.0) + weight / sum(row)
    alive = list(range(length))
    if length > budget - 1:
        recent = alive[-(budget // 2) :]
        heavy = sorted(set(alive) - set(recent), key=lambda t: -sums[t])
        alive = sorted(recent + heavy[: budget - 1 - len(recent)])
    for read, weights in steps:
        new = max([*alive, length - 1, *sums]) + 1
        alive.append(new)
        sums[new] = 0.0
        assert read == alive
        for token in alive:
            sums[token] += weights[token]
        if len(alive) >= budget:
            old = [token for token in alive if token <= new - budget // 2]
            alive.remove(min(old, key=lambda t: sums[t]))


@pytest.mark.parametrize("keep_prompt", [0, 1])
@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("seed", range(3))
def test_raas_evicts_the_page_used_longest_ago(keep_prompt, pad, seed):
    size, length, budget, alpha = 4, [9, 12, 11][seed], 24, 0.08
    policy = RaaS(ONE, budget, page_size=size, alpha=alpha, keep_prompt=keep_prompt)
    steps = drive(policy, length, 45, pad, seed)
    next(steps)
    used = {page: page - 1000 for page in range(-(-length // size))}
    evicted = 0
    for step, (read, weights) in enumerate(steps):
        n = length + step + 1
        used.setdefault((n - 1) // size, step)
        assert read == [t for t in range(n) if t // size in used]
        assert len(read) <= budget
        for page in used:
            if sum(weights[page * size : (page + 1) * size]) > alpha or page == (n - 1) // size:
                used[page] = step
        if n % size == 0 and len(used) >= budget // size:
            fixed = {(n - 1) // size}
            if keep_prompt:
                fixed |= set(range(-(-length // size)))
            victim = min((p for p in used if p not in fixed), key=lambda p: (used[p], p))
            del used[victim]
            evicted += 1
    assert evicted >= 5


def test_raas_may_evict_the_prompt_only_when_asked():
    with pytest.raises(PolicyError, match="never evicts the prompt, and one of 30 tokens needs"):
        RaaS(LAYOUT, budget=32, page_size=16).check(30)
    RaaS(LAYOUT, budget=64, page_size=16).check(30)
    RaaS(LAYOUT, budget=32, page_size=16, keep_prompt=0).check(30)
