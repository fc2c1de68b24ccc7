"""What happens to a cache between two calls of ``generate``: beams, other rows, copies.

Tests of the offloaded cache put it and ``DeltaCache``, as a pair, through each case: on a simulated
device and on a GPU. What the cases call ``same(pair, tokens, mask, steps, **options)`` generates
with both, checks that they give the same bits and hold the same, and gives the tokens.
"""

import copy
import pickle

import torch

TWINS = {
    "copied": copy.deepcopy,
    "pickled": lambda cache: pickle.loads(pickle.dumps(cache)),
}
# What is called, with what, and the rows of three that are then there.
CHOICES = {
    "some": ("batch_select_indices", [2, 0], [2, 0]),
    "by a mask": ("batch_select_indices", [True, False, True], [0, 2]),
    "another order": ("reorder_cache", [1, 2, 0], [1, 2, 0]),
    "one in the place of another": ("reorder_cache", [2, 1, 2], [2, 1, 2]),
    "twice each": ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
}


def longer(mask, tokens):
    """A mask with so many tokens behind it, which are of no padding."""
    return torch.cat([mask, mask.new_ones(len(mask), tokens)], dim=1)


def assert_held(pair):
    """Both caches hold the same."""
    for left, right in zip(pair[0].layers, pair[1].layers, strict=True):
        assert torch.equal(left.keys.cpu(), right.keys.cpu())
        assert torch.equal(left.values.cpu(), right.values.cpu())
        assert left.get_seq_length() == right.get_seq_length()


def beam_search(same, pair, tokens, mask, steps):
    """Beams of two prompts take each other's rows; two of them then decode on, twice each."""
    found = same(pair, tokens, mask, steps, num_beams=3, num_return_sequences=2)
    for cache in pair:
        cache.batch_select_indices(torch.tensor([4, 0]))
        cache.batch_repeat_interleave(2)
    assert_held(pair)
    # Four sequences came, perhaps those of other beams, but they are the same for both caches.
    same(pair, found, longer(mask, steps)[[1, 1, 0, 0]], steps)


def other_rows(same, pair, tokens, mask, steps, choice):
    """Other rows of three decode on, from the next token on."""
    method, argument, rows = CHOICES[choice]
    found = same(pair, tokens, mask, steps)
    if not isinstance(argument, int):
        argument = torch.tensor(argument, device=mask.device)
    for cache in pair:
        getattr(cache, method)(argument)
    assert_held(pair)
    same(pair, found[rows], longer(mask, steps)[rows], steps)


def a_copy_goes_on(same, pair, tokens, mask, steps, twin_of):
    """A copy and what it was made of go on, one after the other; gives the copies."""
    found = same(pair, tokens, mask, steps)
    twins = tuple(twin_of(cache) for cache in pair)
    mask = longer(mask, steps)
    same(twins, torch.cat([found, found[:, -3:]], dim=1), longer(mask, 3), steps)
    same(pair, found, mask, steps)
    return twins
