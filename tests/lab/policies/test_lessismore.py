"""LessIsMore: ranks of all heads merged, a window, and layers that reuse the choice."""

import pytest
import torch
from policy_cases import LAYOUT, look_at, tokens, view_of

from deltadecode.errors import PolicyError
from deltadecode.lab.policies.lessismore import LessIsMore


def merged_by_hand(logits, length, budget, sinks, share=0.25):
    """The first of every head, the second of every head, ..., until enough differ; slow loops."""
    count = int(budget * (1 - share))
    recent = budget - count - sinks
    middle = range(sinks, length - recent)
    ranked = [sorted(middle, key=lambda t: (-head[t].item(), t)) for head in logits]
    chosen = []
    for rank in range(len(middle)):
        for head in ranked:
            if head[rank] not in chosen and len(chosen) < count:
                chosen.append(head[rank])
    return sorted([*range(sinks), *chosen, *range(length - recent, length)])


@pytest.mark.parametrize("seed", range(4))
def test_heads_take_turns_and_all_read_the_same(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths, slots = [40, 29], 40
    view = view_of(lengths, slots)
    logits = torch.randn(2, 2, 2, slots, generator=generator)
    policy = LessIsMore(LAYOUT, budget=16, layers=(1, 3), sinks=2)
    assert policy.select(0, look_at(view, logits), view) is None  # before the first choice
    assert policy.select(1, look_at(view, logits), view) is None
    read = policy.select(2, look_at(view, torch.randn_like(logits)), view)
    assert read.shape == (2, 1, 1, slots)
    for row, length in enumerate(lengths):
        own = logits[row].flatten(0, 1)[:, slots - length :]
        expected = merged_by_hand(own, length, 16, sinks=2)
        assert tokens(read, view, row) == expected and len(expected) == 16


def test_a_later_selection_layer_chooses_anew():
    view = view_of([30], slots=30)
    logits = torch.zeros(1, 2, 2, 30)
    policy = LessIsMore(LAYOUT, budget=8, layers=(1, 3), sinks=1)
    for layer, token in ((1, 12), (3, 17)):
        policy.select(layer, look_at(view, logits.index_fill(3, torch.tensor(token), 5.0)), view)
        assert token in tokens(policy.select(layer + 1, look_at(view, logits), view), view)


def test_default_layers_are_the_papers_shares_of_the_depth():
    wide = type(LAYOUT)(tuple(range(36)), 4, 2)
    policy = LessIsMore(wide, budget=64)
    assert policy.selecting == [2, 12]
    assert (policy.sinks, policy.chosen, policy.recent) == (4, 48, 12)


def test_a_budget_without_room_is_refused():
    with pytest.raises(PolicyError, match="a token to choose and a recent one beside 4 sinks"):
        LessIsMore(LAYOUT, budget=16)
