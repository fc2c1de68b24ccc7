"""Batches without drafts run from full CUDA graphs of their own, which a CPU can only look up."""

from types import SimpleNamespace

import pytest
from vllm.config import CUDAGraphMode
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from deltadecode.engines.vllm import runner as own
from deltadecode_vllm import PROPOSER

DRAFTS, ROWS = 4, 20


@pytest.fixture
def runner():
    """What vLLM's model runner looks a graph up with, beside our proposer."""
    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, compile_sizes=[],
        is_attention_compiled_piecewise=lambda: True, cudagraph_specialize_lora=False,
        # As vLLM rounds them beside a proposer.
        cudagraph_capture_sizes=[5, 10, 20, 40, 100], max_cudagraph_capture_size=100,
        pass_config=SimpleNamespace(enable_sp=False),
    )  # fmt: skip
    config = SimpleNamespace(
        compilation_config=compilation, lora_config=None, num_speculative_tokens=DRAFTS,
        scheduler_config=SimpleNamespace(max_num_seqs=ROWS),
        parallel_config=SimpleNamespace(data_parallel_size=1),
        observability_config=SimpleNamespace(cudagraph_metrics=False),
        speculative_config=SimpleNamespace(model=PROPOSER),
    )  # fmt: skip
    dispatcher = CudagraphDispatcher(config)
    dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL_AND_PIECEWISE, 1 + DRAFTS)
    made = SimpleNamespace(
        vllm_config=config, compilation_config=compilation, cudagraph_dispatcher=dispatcher,
        uniform_decode_query_len=1 + DRAFTS, _is_uniform_decode=GPUModelRunner._is_uniform_decode,
        _pad_for_sequence_parallelism=lambda tokens: tokens,
        model_config=SimpleNamespace(is_encoder_decoder=False),
        input_batch=SimpleNamespace(lora_id_to_lora_request={}), drafter=SimpleNamespace(),
    )  # fmt: skip
    made.drafter.steps = {tokens: own.UniformSteps.of(made, tokens) for tokens in (1, 3)}
    return made


def graph(runner, new, **forced):
    """Kind and size of the graph that a batch of rows of ``new`` tokens runs from."""
    choose = own._ours(GPUModelRunner._determine_batch_execution_and_padding, own._dispatch)
    mode, batch, *_ = choose(
        runner, num_tokens=sum(new), num_reqs=len(new), num_scheduled_tokens_np=None,
        max_num_scheduled_tokens=max(new), use_cascade_attn=False, **forced,
    )  # fmt: skip
    return mode.name, batch.num_tokens, batch.num_reqs


def test_rows_of_one_token_have_full_graphs_of_their_own(runner):
    assert graph(runner, [1] * 3) == ("FULL", 4, 4)
    assert graph(runner, [1] * 17) == ("FULL", 20, 20)
    assert graph(runner, [1] * 20) == ("FULL", 20, 20)
    # Those of vLLM are as before.
    assert graph(runner, [5] * 4) == ("FULL", 20, 4)
    assert graph(runner, [5] * 3) == ("FULL", 20, 4)
    assert graph(runner, [1, 5, 5])[0] == graph(runner, [1, 16])[0] == "PIECEWISE"
    assert runner.uniform_decode_query_len == 1 + DRAFTS
    # While vLLM captures, it says itself what a batch is.
    assert graph(runner, [1] * 20, force_uniform_decode=False)[0] == "PIECEWISE"
    runner.drafter.steps.clear()
    assert graph(runner, [1] * 20)[0] == "PIECEWISE"


def test_rows_with_few_drafts_have_full_graphs_of_their_own(runner):
    assert graph(runner, [3] * 3) == ("FULL", 12, 4)
    assert graph(runner, [3] * 20) == ("FULL", 60, 20)
    assert graph(runner, [3, 3, 2])[0] == graph(runner, [2] * 3)[0] == "PIECEWISE"


@pytest.mark.parametrize("tokens", [1, 3])
def test_they_are_captured_and_nothing_else_is(runner, tokens):
    with runner.drafter.steps[tokens].used(runner):
        ((mode, batches),) = runner.cudagraph_dispatcher.get_capture_descs()
        # As vLLM has it while it captures one.
        found = graph(runner, [tokens] * 16, force_uniform_decode=True)
        assert found == ("FULL", 16 * tokens, 16)
    assert mode == CUDAGraphMode.FULL
    assert [batch.num_tokens for batch in batches] == [tokens * n for n in (20, 16, 8, 4, 2, 1)]
    assert all(batch.uniform and batch.num_reqs * tokens == batch.num_tokens for batch in batches)
    known = runner.cudagraph_dispatcher.cudagraph_keys[CUDAGraphMode.FULL]
    assert not known & set(batches) and len(known) == 5


def test_rows_of_captured_batches_are_those_of_vllm_without_drafts():
    assert own.row_sizes(3) == [1, 2, 3]
    assert own.row_sizes(64) == [1, 2, 4, *range(8, 65, 8)]
    assert own.row_sizes(300) == [1, 2, 4, *range(8, 257, 8), 272, 288, 300]


def test_the_runner_captures_them_behind_its_own(runner):
    lengths, bound = [], []
    runner.drafter.steps = {}
    runner.drafter.capture = bound.append

    def capture():
        lengths.append(runner.uniform_decode_query_len)
        return 10

    assert own._capture(runner.drafter, runner, capture) == 40
    assert lengths == [5, 1, 2, 3] and bound == [runner]
    assert list(runner.drafter.steps) == [1, 2, 3]


def test_nothing_is_drafted_behind_parts_of_prompts(runner):
    step, common = SimpleNamespace(num_spec_tokens_to_schedule=DRAFTS), SimpleNamespace(seq_lens=7)
    runner.drafter.propose = lambda drafts, lengths, ends: (drafts, lengths, ends)
    verified = SimpleNamespace(cu_num_draft_tokens=9)
    for alone, drafts in ((True, 0), (False, DRAFTS)):
        runner._is_all_reqs_chunked_prefill = lambda alone=alone: alone
        rest = (None,) * 5
        assert own._propose(runner.drafter, runner, None, step, *rest, None, common, None) == (
            drafts, 7, None,
        )  # fmt: skip
        found = own._propose(runner.drafter, runner, None, step, *rest, verified, common, None)
        assert found == (drafts, 7, 9)


def test_a_runner_without_full_graphs_has_none(runner):
    runner.compilation_config.pass_config.enable_sp = True
    assert own.UniformSteps.of(runner, 1) is None
    runner.compilation_config.pass_config.enable_sp = False
    runner.cudagraph_dispatcher.cudagraph_mode = CUDAGraphMode.PIECEWISE
    assert own.UniformSteps.of(runner, 1) is None
