"""How a batch divides into decode rows and others."""

import pytest
import torch

from deltadecode.engines.serving.rows import (
    PromptRows,
    Rows,
    count_decode_rows,
    narrow_table,
    pad_rows,
)


@pytest.mark.parametrize(
    ("query_lens", "rows"),
    [([1, 1, 1], 3), ([1, 1, 5, 7], 2), ([5, 7], 0), ([1, 4, 1], 1), ([3, 3], 0)],
)
def test_decode_rows_come_first(query_lens, rows):
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    assert count_decode_rows(starts, len(query_lens), sum(query_lens), max(query_lens)) == rows


def test_padding_rows_of_a_graph_are_decode_rows():
    assert count_decode_rows(torch.tensor([0, 1, 2, 2, 2]), 4, 4, 1) == 4


@pytest.mark.parametrize(
    ("count", "size"), [(1, 1), (3, 4), (5, 8), (9, 16), (250, 256), (257, 272)]
)
def test_decode_rows_of_mixed_batches_are_rounded_up_to_captured_sizes(count, size):
    table = torch.ones(count + 1, 3, dtype=torch.int32)
    rows = Rows(count)
    pad_rows(rows, table, torch.full((count + 1,), 9, dtype=torch.int32), count + 100)
    if size == count:
        assert rows.block_table is None and rows.seq_lens is None
        return
    assert rows.block_table.shape == (size, 3)
    assert rows.seq_lens.tolist() == [9] * count + [0] * (size - count)


def test_rows_of_prompts_are_kept_in_one_place_and_forgotten():
    prompts = PromptRows(6, torch.device("cpu"))
    first = prompts.update(None, 3)
    assert first.tolist() == [False] * 6
    again = prompts.update(torch.tensor([False, True, False, True]), 3)
    assert again.data_ptr() == first.data_ptr()
    assert again.tolist() == [False, True, False, False, False, False]
    assert prompts.update(None, 3).tolist() == [False] * 6
    assert prompts.update(torch.zeros(4, dtype=torch.bool), 3).tolist() == [False] * 6


def test_padding_rows_may_be_missing_from_the_rows_of_prompts():
    prompts = PromptRows(6, torch.device("cpu"))
    # A captured batch of 4 rows, two of them padding.
    flags = prompts.update(torch.tensor([False, True]), 4)
    assert flags.tolist() == [False, True, False, False, False, False]


def test_too_few_tokens_to_stand_in_for_padding_rows():
    rows = Rows(5)
    pad_rows(rows, torch.ones(6, 3), torch.ones(6), tokens=7)
    assert rows.seq_lens is None


def test_narrow_table_keeps_the_last_token_s_block():
    table = torch.arange(12).view(2, 6)
    assert narrow_table(table, 16, 33).shape == (2, 3)
    assert narrow_table(table, 16, 32).shape == (2, 2)
    assert narrow_table(table, 16, 0).shape == (2, 1)
