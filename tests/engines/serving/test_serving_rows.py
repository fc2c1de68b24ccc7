"""How a batch divides into decode rows and others."""

import pytest
import torch

from deltadecode.engines.serving.rows import PromptRows, divide, narrow_table

CPU = torch.device("cpu")


def divided(query_lens, most, tokens=None):
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    longest = max(query_lens)
    return divide(starts, len(query_lens), tokens or sum(query_lens), longest, most, CPU)


@pytest.mark.parametrize(
    ("query_lens", "rows"),
    [([1, 1, 1], 3), ([1, 1, 5, 7], 2), ([5, 7], 0), ([1, 4, 1], 1), ([3, 3], 0)],
)
def test_decode_rows_come_first(query_lens, rows):
    found = divided(query_lens, most=1)
    assert (found.decode, found.tokens, found.decode_tokens) == (rows, 1, rows)
    assert found.drafts is None


@pytest.mark.parametrize(
    ("query_lens", "rows", "tokens", "decode_tokens"),
    [
        ([3, 3], 2, 3, 6),
        ([3, 3, 9], 2, 3, 6),
        ([1, 1], 2, 1, 2),
        ([1, 1, 9], 2, 1, 2),
        ([9], 0, 1, 0),
    ],
)
def test_rows_of_equal_numbers_of_drafts_follow_each_other(query_lens, rows, tokens, decode_tokens):
    found = divided(query_lens, most=3)
    assert (found.decode, found.tokens, found.decode_tokens) == (rows, tokens, decode_tokens)
    assert found.drafts is None


@pytest.mark.parametrize("query_lens", [[1, 3], [3, 1, 2], [2, 2], [1, 2, 4], [3, 3, 1, 8, 9]])
def test_rows_of_unlike_numbers_of_drafts_end_with_their_new_tokens(query_lens):
    found = divided(query_lens, most=3)
    rows = sum(1 for new in query_lens if new <= 3)
    assert (found.decode, found.tokens) == (rows, 3)
    queries = found.drafts.queries.view(rows, 3).tolist()
    first = 0
    for row, new in enumerate(query_lens[:rows]):
        assert queries[row][3 - new :] == list(range(first, first + new))
        assert found.drafts.idle[row].tolist() == [place < 3 - new for place in range(3)]
        first += new
    assert found.decode_tokens == first
    # Each token is found again where its query is, and idle queries are none of the batch's ends.
    assert found.drafts.queries[found.drafts.places].tolist() == list(range(first))
    assert found.drafts.queries.min() >= 0


def test_fewer_drafts_have_queries_of_their_own_where_kernels_are_made_for_them():
    def found(*starts, tokens):
        rows = divide(torch.tensor(starts), len(starts) - 1, tokens, 4, 5, CPU, uniform=(3, 5))
        return rows.tokens, rows.decode_tokens, rows.drafts is None

    assert found(0, 3, 6, 6, tokens=9) == (3, 9, True)
    assert found(0, 5, 10, 10, tokens=15) == (5, 15, True)
    assert found(0, 2, 4, tokens=4) == (5, 4, False)
    assert found(0, 3, 5, tokens=5) == (5, 5, False)


def test_padding_rows_of_a_graph_are_decode_rows():
    found = divide(torch.tensor([0, 1, 2, 2, 2]), 4, 4, 1, 1, CPU)
    assert (found.decode, found.decode_tokens) == (4, 4)
    for starts in ([0, 3, 6, 6, 6], [0, 0, 0, 0, 0]):  # replayed, captured
        found = divide(torch.tensor(starts), 4, 12, 3, 3, CPU)
        assert (found.decode, found.tokens, found.decode_tokens) == (4, 3, 12)
        assert found.drafts is None


def test_rows_of_prompts_are_kept_in_one_place_and_forgotten():
    prompts = PromptRows(6, torch.device("cpu"))
    first = prompts.update(None, 3)
    assert first.tolist() == [False] * 6
    again = prompts.update(torch.tensor([False, True, False, True]), 3)
    assert again.data_ptr() == first.data_ptr()
    assert again.tolist() == [False, True, False, False, False, False]
    assert prompts.update(None, 3).tolist() == [False] * 6
    assert prompts.update(torch.zeros(4, dtype=torch.bool), 3).tolist() == [False] * 6


def test_rows_of_prompts_are_allocated_with_the_first_batch(monkeypatch):
    """What is allocated together with an engine's cache is lost when the engine sleeps."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", None)
        prompts = PromptRows(6, torch.device("cpu"))
    assert prompts.update(None, 3).tolist() == [False] * 6


def test_padding_rows_may_be_missing_from_the_rows_of_prompts():
    prompts = PromptRows(6, torch.device("cpu"))
    # A captured batch of 4 rows, two of them padding.
    flags = prompts.update(torch.tensor([False, True]), 4)
    assert flags.tolist() == [False, True, False, False, False, False]


def test_narrow_table_keeps_the_last_token_s_block():
    table = torch.arange(12).view(2, 6)
    assert narrow_table(table, 16, 33).shape == (2, 3)
    assert narrow_table(table, 16, 32).shape == (2, 2)
    assert narrow_table(table, 16, 0).shape == (2, 1)
