"""OmniKV: the context of the prompt that filter layers choose, and all that is generated."""

import torch
from policy_cases import LAYOUT, look_at, tokens, view_of

from deltadecode.lab.policies.omnikv import OmniKV


def test_filter_layers_choose_by_the_largest_weight_of_any_head():
    view = view_of([9], slots=9, prompt=[7])
    weights = torch.tensor(
        [[0.3, 0.28, 0.28, 0.14, 0, 0, 0, 0, 0], [0, 0.15, 0.14, 0, 0.31, 0.4, 0, 0, 0]]
    )
    logits = weights.clamp(min=1e-9).log()[None, None]
    policy = OmniKV(LAYOUT, budget=3, layers=(1, 4), wait=1)
    others = look_at(view, torch.zeros(1, 1, 2, 9))
    assert policy.select(0, others, view) is None
    assert policy.select(1, look_at(view, logits), view) is None
    assert policy.select(2, others, view) is None  # waits
    # 0.4, 0.31 and 0.3; the means are largest for 1, 2 and 5. Tokens 7 and 8 are generated.
    assert tokens(policy.select(3, others, view), view) == [0, 4, 5, 7, 8]
    assert policy.select(4, look_at(view, logits.flip(3)), view) is None
    assert policy.select(5, others, view) is None


def test_what_is_generated_is_not_chosen_but_read():
    view = view_of([10, 8], slots=10, prompt=[6, 4])
    logits = torch.zeros(2, 1, 2, 10)
    logits[..., -1] = 9.0  # the new token has the most weight, and costs no place
    logits[1, ..., 2 + 1] = 5.0
    policy = OmniKV(LAYOUT, budget=1, layers=(0,), wait=0)
    policy.select(0, look_at(view, logits), view)
    read = policy.select(1, look_at(view, logits), view)
    assert tokens(read, view, 0) == [0, 6, 7, 8, 9]
    assert tokens(read, view, 1) == [1, 4, 5, 6, 7]


def test_default_filters_stand_where_the_authors_put_them():
    llama = type(LAYOUT)(tuple(range(32)), 32, 8)
    policy = OmniKV(llama, budget=64)
    assert policy.filters == [2, 8, 18]
    assert policy.full == {0, 1, 2, 3, 8, 9, 18, 19}
