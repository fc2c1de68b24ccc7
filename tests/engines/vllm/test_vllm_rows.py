"""The rows of a vLLM batch, and prefill on CPUs."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from deltadecode.engines.vllm import builder as builders
from deltadecode.engines.vllm import versions
from deltadecode.engines.vllm.builder import DeltaBuilder, most_rows
from deltadecode.engines.vllm.cpu import causal


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


def test_the_other_rows_are_a_batch_of_their_own():
    for decode in ([1, 1], [3, 2]):
        common = batch([*decode, 5, 3], [9, 8, 25, 3])
        rest = versions.rows_after(common, 2)
        assert rest.query_start_loc.tolist() == [0, 5, 8]
        assert rest.seq_lens.tolist() == [25, 3]
        assert (rest.num_reqs, rest.num_actual_tokens, rest.max_query_len) == (2, 8, 5)
        assert torch.equal(rest.block_table_tensor, common.block_table_tensor[2:])
        assert rest.slot_mapping.tolist() == list(range(sum(decode), sum(decode) + 8))


class StockBuilder:
    def __init__(self, config):
        self.vllm_config, self.device, self.layer_names = config, torch.device("cpu"), []

    def _init_reorder_batch_threshold(self, threshold):
        self.reorder_batch_threshold = threshold

    def build(self, prefix, common, fast_build):
        return SimpleNamespace(common=common)


class Builder(DeltaBuilder, StockBuilder):
    splits = False


def builder_with(speculative_config=None):
    return Builder(
        SimpleNamespace(
            compilation_config=SimpleNamespace(
                max_cudagraph_capture_size=0, static_forward_context={}
            ),
            scheduler_config=SimpleNamespace(max_num_seqs=4),
            speculative_config=speculative_config,
        )
    )


def test_rows_of_drafts_are_decode_rows_of_an_engine_that_drafts():
    common = batch([3, 3, 5], [9, 8, 7])
    builder = builder_with(SimpleNamespace(num_speculative_tokens=2))
    rows = builder.build(0, common).delta
    assert builder.reorder_batch_threshold == 3
    assert (rows.decode, rows.tokens, rows.decode_tokens) == (2, 3, 6)
    for config in (None, SimpleNamespace(num_speculative_tokens=None)):
        builder = builder_with(config)
        assert builder.reorder_batch_threshold == 1
        assert builder.build(0, common).delta.decode == 0


@pytest.mark.parametrize(
    ("new_tokens", "drafts", "others", "sorts"),
    [
        ([1, 1, 1], 0, [], False),
        ([1, 1, 5], 0, [], True),
        ([2, 1, 3], 2, [], False),
        ([2, 1, 4], 2, [], True),
        ([1, 1, 1], 0, [None], False),
        # Layers of another kind, such as linear ones, have an order of their own.
        ([1, 1, 1], 0, [1], True),
        ([1, 1, 1], None, [None], True),
    ],
)
def test_only_batches_with_other_rows_are_sorted(new_tokens, drafts, others, sorts):
    """A ``drafts`` of None stands for an engine that has no order to keep, as vLLM decides."""
    ours = builder_with(SimpleNamespace(num_speculative_tokens=drafts))
    others = [SimpleNamespace(reorder_batch_threshold=threshold) for threshold in others]
    groups = [SimpleNamespace(get_metadata_builder=lambda b=b: b) for b in [ours, *others]]
    runner = SimpleNamespace(
        attn_groups=[groups[:1], groups[1:]],
        reorder_batch_threshold=None if drafts is None else 1 + drafts,
    )
    step = SimpleNamespace(
        num_scheduled_tokens=dict(enumerate(new_tokens)),
        total_num_scheduled_tokens=sum(new_tokens),
    )
    sorted_ = []
    builders._reorder_mixed(lambda runner, step: sorted_.append(step))(runner, step)
    assert sorted_ == [step] * sorts


def test_rows_of_prompts_are_those_of_the_runner_where_it_passes_them_on():
    builder = builder_with()
    common = batch([1, 1, 1, 1], [9, 8, 7, 6]).replace(
        is_prefilling=torch.tensor([True, False, False, False])
    )
    assert builder.build(0, common).delta.prompts.tolist() == [True, False, False, False]
    builder.prefilling = torch.tensor([False, True])
    assert builder.build(0, common).delta.prompts.tolist() == [False, True, False, False]
    assert builder.build(0, common).delta.prompts.tolist() == [True, False, False, False]


@pytest.mark.parametrize(("seqs", "captured", "rows"), [(32, 0, 32), (5, None, 5), (200, 257, 257)])
def test_most_rows_hold_every_captured_batch(seqs, captured, rows):
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=captured),
        scheduler_config=SimpleNamespace(max_num_seqs=seqs),
    )
    assert most_rows(config) == rows


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
