"""How a batch divides into decode rows and others."""

from types import SimpleNamespace

import numpy
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from deltadecode.engines.vllm import versions
from deltadecode.engines.vllm.cpu import causal
from deltadecode.engines.vllm.step import (
    PromptRows,
    Rows,
    count_decode_rows,
    most_rows,
    narrow_table,
    pad_rows,
)


def batch(query_lens, seq_lens, blocks=4):
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=len(query_lens),
        num_actual_tokens=sum(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.arange(len(query_lens) * blocks).view(-1, blocks).int(),
        slot_mapping=torch.arange(sum(query_lens)),
        seq_lens_cpu_upper_bound=torch.tensor(seq_lens, dtype=torch.int32),
    )


@pytest.mark.parametrize(
    ("query_lens", "rows"),
    [([1, 1, 1], 3), ([1, 1, 5, 7], 2), ([5, 7], 0), ([1, 4, 1], 1), ([3, 3], 0)],
)
def test_decode_rows_come_first(query_lens, rows):
    assert count_decode_rows(batch(query_lens, [9] * len(query_lens))) == rows


def test_padding_rows_of_a_graph_are_decode_rows():
    padded = batch([1, 1, 0, 0], [9, 5, 0, 0]).replace(num_actual_tokens=4)
    assert count_decode_rows(padded) == 4


def test_the_other_rows_are_a_batch_of_their_own():
    common = batch([1, 1, 5, 3], [9, 8, 25, 3])
    rest = versions.rows_after(common, 2)
    assert rest.query_start_loc.tolist() == [0, 5, 8]
    assert rest.seq_lens.tolist() == [25, 3]
    assert (rest.num_reqs, rest.num_actual_tokens, rest.max_query_len) == (2, 8, 5)
    assert torch.equal(rest.block_table_tensor, common.block_table_tensor[2:])
    assert rest.slot_mapping.tolist() == list(range(2, 10))


@pytest.mark.parametrize(
    ("count", "size"), [(1, 1), (3, 4), (5, 8), (9, 16), (250, 256), (257, 272)]
)
def test_decode_rows_of_mixed_batches_are_rounded_up_to_captured_sizes(count, size):
    metadata = SimpleNamespace(
        num_actual_tokens=count + 100,
        block_table=torch.ones(count + 1, 3, dtype=torch.int32),
        seq_lens=torch.full((count + 1,), 9, dtype=torch.int32),
    )
    rows = Rows(count)
    pad_rows(rows, metadata)
    if size == count:
        assert rows.block_table is None and rows.seq_lens is None
        return
    assert rows.block_table.shape == (size, 3)
    assert rows.seq_lens.tolist() == [9] * count + [0] * (size - count)


def test_rows_of_prompts_are_found_in_one_place_and_forgotten():
    prompts = PromptRows(6, torch.device("cpu"))
    common = batch([1, 1, 1, 5], [9, 8, 7, 6])
    first = prompts.update(common, 3)
    assert first.tolist() == [False] * 6
    flagged = common.replace(is_prefilling=torch.tensor([False, True, False, True]))
    again = prompts.update(flagged, 3)
    assert again.data_ptr() == first.data_ptr()
    assert again.tolist() == [False, True, False, False, False, False]
    assert prompts.update(common, 3).tolist() == [False] * 6
    none = common.replace(is_prefilling=torch.zeros(4, dtype=torch.bool))
    assert prompts.update(none, 3).tolist() == [False] * 6


def test_rows_of_prompts_are_those_of_the_runner_where_it_is_asked():
    prompts = PromptRows(6, torch.device("cpu"))
    # A captured batch of 4 rows, two of them padding, that the runner leaves out.
    common = batch([1, 1, 1, 1], [9, 8, 0, 0])
    told = numpy.array([False, True])
    assert prompts.update(common, 4, told).tolist() == [False, True, False, False, False, False]
    short = common.replace(is_prefilling=torch.tensor([True, False]))
    assert prompts.update(short, 4).tolist() == [True, False, False, False, False, False]
    assert prompts.update(short, 4, numpy.zeros(2, dtype=bool)).tolist() == [False] * 6


def test_a_model_state_passes_on_which_rows_belong_to_prompts():
    class State:
        def prepare_attn(self, input_batch, mode, tables, slots, attn_groups, config, **more):
            return self, mode, [builder.__dict__ for builder in builders], more

    builders = [SimpleNamespace(told=None), SimpleNamespace()]
    groups = [
        [SimpleNamespace(get_metadata_builder=lambda _, builder=builder: builder)]
        for builder in builders
    ]
    versions.pass_on_prompts(State)
    versions.pass_on_prompts(State)
    batch = SimpleNamespace(is_prefilling_np=numpy.array([True]))
    state = State()
    found = state.prepare_attn(batch, "full", (), None, attn_groups=groups, config=None, more=1)
    assert found == (state, "full", [{"told": batch.is_prefilling_np}, {}], {"more": 1})


@pytest.mark.parametrize(("seqs", "captured", "rows"), [(32, 0, 32), (5, None, 8), (200, 257, 272)])
def test_most_rows_hold_every_padded_batch(seqs, captured, rows):
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=captured),
        scheduler_config=SimpleNamespace(max_num_seqs=seqs),
    )
    assert most_rows(config) == rows


def test_too_few_tokens_to_stand_in_for_padding_rows():
    metadata = SimpleNamespace(num_actual_tokens=7)
    rows = Rows(5)
    pad_rows(rows, metadata)
    assert rows.seq_lens is None


def test_narrow_table_keeps_the_last_token_s_block():
    table = torch.arange(12).view(2, 6)
    assert narrow_table(table, 16, 33).shape == (2, 3)
    assert narrow_table(table, 16, 32).shape == (2, 2)
    assert narrow_table(table, 16, 0).shape == (2, 1)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_prefill_on_cpus_equals_a_loop_over_tokens(softcap, with_sinks):
    torch.manual_seed(0)
    new, tokens, heads, kv_heads, dim = 5, 9, 4, 2, 8
    q = torch.randn(new, heads, dim, dtype=torch.float64)
    k, v = torch.randn(2, tokens, kv_heads, dim, dtype=torch.float64).unbind(0)
    sinks = torch.randn(heads) if with_sinks else None
    got = causal(q.float(), k.float(), v.float(), 0.5, sinks, softcap)
    for i in range(new):
        for h in range(heads):
            seen = tokens - new + i + 1
            logits = 0.5 * k[:seen, h // 2] @ q[i, h]
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            weights = logits.exp()
            total = weights.sum() + (sinks[h].double().exp() if with_sinks else 0.0)
            expected = (weights / total) @ v[:seen, h // 2]
            torch.testing.assert_close(got[i, h], expected.float(), rtol=1e-4, atol=1e-5)
