"""KeyDiff: the token whose key is most like the mean of the normalized keys goes."""

import torch
from policy_cases import LAYOUT, look_at, tokens, view_of
from torch.nn.functional import cosine_similarity

from deltadecode.lab.policies.base import Scores
from deltadecode.lab.policies.keydiff import KeyDiff


def by_hand(keys, alive, budget, newest):
    """Tokens left when those go one by one... all at once at the prompt, one at a step."""
    unit = [keys[t] / keys[t].norm() for t in alive]
    anchor = torch.stack(unit).mean(dim=0)
    similar = {t: float(cosine_similarity(keys[t], anchor, dim=0)) for t in alive if t != newest}
    gone = sorted(similar, key=similar.get)[::-1][: max(len(alive) - budget, 0)]
    return [t for t in alive if t not in gone]


def test_it_evicts_as_a_slow_loop_does():
    generator = torch.Generator().manual_seed(3)
    lengths, prompt, steps, budget = [14, 11], 14, 5, 6
    key = torch.randn(2, 2, prompt + steps, 8, generator=generator)
    policy = KeyDiff(LAYOUT, budget)
    view = view_of(lengths, prompt, step=-1)
    policy.prefill(0, torch.zeros(2, 4, prompt, 8), key[:, :, :prompt], Scores(1.0), view)
    left = {
        (row, head): by_hand(key[row, head, prompt - n :], list(range(n)), budget - 1, newest=n - 1)
        for row, n in enumerate(lengths)
        for head in range(2)
    }
    for step in range(steps):
        slots = prompt + step + 1
        view = view_of([n + step + 1 for n in lengths], slots, prompt=lengths, step=step)
        read = policy.select(0, look_at(view, key=key[:, :, :slots]), view)
        for (row, head), alive in left.items():
            newest = lengths[row] + step
            alive.append(newest)
            assert tokens(read, view, row, kv_head=head) == alive and len(alive) <= budget
            own = key[row, head, prompt - lengths[row] :]
            left[row, head] = by_hand(own, alive, budget - 1, newest)
        policy.observe(0, torch.zeros(2, 2, 2, slots), view)


def test_recent_tokens_can_be_protected():
    key = torch.ones(1, 2, 12, 4)
    key[:, :, :6] = torch.eye(4).repeat(2, 1)[:6]
    policy = KeyDiff(LAYOUT, budget=6, recent=3)
    policy.prefill(0, torch.zeros(1, 4, 12, 4), key, Scores(1.0), view_of([12], 12, step=-1))
    view = view_of([13], 13, prompt=[12])
    key = torch.cat([key, torch.ones(1, 2, 1, 4)], dim=2)
    read = tokens(policy.select(0, look_at(view, key=key), view), view)
    assert read[-4:] == [9, 10, 11, 12] and max(read[:-4]) < 6
