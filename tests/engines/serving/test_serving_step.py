"""One decode step of a Δ-layer and its sparse layer, with drafts in the rows."""

import pytest
import torch

from deltadecode import DeltaConfig
from deltadecode.engines.serving.settings import ServingSettings
from deltadecode.engines.serving.step import Cache, ForwardPass, attend, find_short

CONFIG = DeltaConfig(4, 3, 1, 1, (), (0,))
LENGTHS = [30, 22, 9]


def settings(**own):
    return ServingSettings(CONFIG, CONFIG.layer_plan(2), **own)


def step(q, cache, given, **more):
    forward = ForwardPass()
    full = attend(given, 0, "delta", q, cache, forward, scale=0.4, **more)
    return full, attend(given, 1, "sparse", q, cache, forward, scale=0.4, **more)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    table = torch.randperm(24).view(3, 8).int()
    k, v = torch.randn(2, 24, 4, 1, 8)
    return torch.randn(3, 3, 2, 8), Cache(k, v, table, torch.tensor(LENGTHS, dtype=torch.int32))


def alone(q, cache, row, place):
    """A token of a row, decoded when it was the last one."""
    tokens = cache.seq_lens[row : row + 1] - q.shape[1] + 1 + place
    return q[row : row + 1, place], Cache(
        cache.k, cache.v, cache.block_table[row : row + 1], tokens
    )


@pytest.mark.parametrize("sync_heads", [False, True])
def test_rule10_each_draft_is_decoded_as_if_alone(batch, sync_heads):
    q, cache = batch
    more = {"over_all_ranks": lambda scores: scores} if sync_heads else {}
    found = step(q, cache, settings(sync_heads=sync_heads), **more)
    for row in range(3):
        for place in range(3):
            expected = step(*alone(q, cache, row, place), settings())
            for one, many in zip(expected, found, strict=True):
                torch.testing.assert_close(many[row, place], one[0])
    assert not torch.allclose(*found)


def test_rule1_the_last_tokens_of_a_prompt_read_everything(batch):
    q, cache = batch
    prompts = torch.tensor([False, True, False, False])
    full, sparse = step(q, cache, settings(), prompts=prompts)
    torch.testing.assert_close(sparse[1], full[1])
    assert torch.equal(sparse[0], step(q, cache, settings())[1][0])


def test_queries_that_are_no_new_tokens_cost_nothing_in_sparse_layers(batch):
    q, cache = batch
    idle = torch.zeros(3, 3, dtype=torch.bool)
    idle[0, :2] = idle[1, 0] = True
    prompts = torch.tensor([True, False, False])
    _, sparse = step(q, cache, settings(), idle=idle, prompts=prompts)
    _, every = step(q, cache, settings(), prompts=prompts)
    assert not sparse[idle].any()
    assert torch.equal(sparse[~idle], every[~idle])


def test_rule6_tokens_that_see_less_than_min_tokens_read_everything_in_any_batch(batch):
    q, cache = batch
    full, sparse = step(q, cache, settings(min_tokens=22))
    every = torch.tensor([[False] * 3, [True, True, False], [True] * 3])
    torch.testing.assert_close(sparse[every], full[every])
    assert torch.equal(sparse[~every], step(q, cache, settings())[1][~every])
    for row in range(3):
        for place in range(3):
            one = step(*alone(q, cache, row, place), settings(min_tokens=22))[1]
            torch.testing.assert_close(sparse[row, place], one[0])


def test_min_tokens_within_the_budget_cost_nothing():
    lengths, counts = torch.tensor([5, 40]), torch.tensor([[3, 3], [3, 3]])
    config = settings().config
    budget = config.page_size * config.budget_pages
    assert find_short(settings(min_tokens=budget), lengths, counts) is None
    short = find_short(settings(min_tokens=budget + 1), lengths, counts)
    assert short is not None and short.tolist() == [[True, True], [False, False]]


def test_padding_rows_stay_empty_with_min_tokens(batch):
    q, cache = batch
    cache.seq_lens[1] = 0
    forward = ForwardPass()
    attend(settings(min_tokens=22), 0, "delta", q[:, 0].contiguous(), cache, forward, scale=0.4)
    assert forward.selections[0][1].tolist() == [3, 0, -1]
