"""Lossless mode inside vLLM's model runner, which lets proposers of others know little.

For our proposer the runner tells when it has its cache and its graphs, hands over sampled tokens
while they are on the device (that is what asynchronous scheduling needs), and runs batches without
drafts from full CUDA graphs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor

from deltadecode.engines.serving.drafting import draft_choices
from deltadecode_vllm import is_lossless, wrap_once

# Rows of captured batches: steps as vLLM has them without drafts.
_FINE, _COARSE, _COARSE_FROM = 8, 16, 256


def wrap_runner() -> None:
    """Let our proposer take part in what the model runner does."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wraps: dict[str, Callable[..., Any]] = {
        "initialize_kv_cache": _bind,
        "capture_model": _capture,
        "_bookkeeping_sync": _hand_over,
        "propose_draft_token_ids": _propose,
        "_determine_batch_execution_and_padding": _dispatch,
    }
    for name, instead in wraps.items():
        wrap_once(GPUModelRunner, name, partial(_ours, instead=instead))


def _ours(original: Callable[..., Any], instead: Callable[..., Any]) -> Any:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        proposer = getattr(self, "drafter", None)
        if proposer is None or not is_lossless(self.vllm_config):
            return original(self, *args, **kwargs)
        return instead(proposer, self, partial(original, self), *args, **kwargs)

    return wrapped


def _bind(proposer: Any, runner: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    proposer.bind(runner)
    return result


def _capture(proposer: Any, runner: Any, original: Any) -> Any:
    taken = original()
    # Batches without drafts, and with fewer than most of them.
    most = runner.uniform_decode_query_len
    for tokens in (1, *(1 + drafts for drafts in draft_choices(most - 1))):
        steps = UniformSteps.of(runner, tokens) if tokens < most else None
        if steps is not None:
            with steps.used(runner):
                taken += original()
            proposer.steps[tokens] = steps
    proposer.capture(runner)
    return taken


def _hand_over(
    proposer: Any, runner: Any, original: Any, scheduler_output: Any, sampler_output: Any,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    tokens: Tensor = sampler_output.sampled_token_ids
    proposer.take(tokens, runner.discard_request_mask.gpu[: len(tokens)])
    if runner.use_async_scheduling and tokens.shape[1] > 1:
        # What the next step begins with, and how many drafts this one has kept.
        runner._copy_valid_sampled_token_count(*proposer.newest())
    return original(scheduler_output, sampler_output, *args, **kwargs)


def _propose(
    proposer: Any, runner: Any, original: Any, scheduler_output: Any, sampled: Any,
    sampling: Any, hidden: Any, sample_hidden: Any, others: Any, verified: Any, common: Any,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    ends = None if verified is None else verified.cu_num_draft_tokens
    drafts = scheduler_output.num_spec_tokens_to_schedule
    if runner._is_all_reqs_chunked_prefill():
        drafts = 0  # no row has a token to draft behind
    return proposer.propose(drafts, common.seq_lens, ends)


def _dispatch(proposer: Any, runner: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    # While vLLM captures a graph, it says itself what its batch is.
    captures = kwargs.get("force_uniform_decode") is not None
    steps = None if captures else proposer.steps.get(kwargs["max_num_scheduled_tokens"])
    with steps.used(runner) if steps and steps.are(kwargs) else nullcontext():
        return original(*args, **kwargs)


class UniformSteps:
    """Full CUDA graphs of batches of so many tokens a row: those without drafts, or with few.

    Beside a proposer vLLM has full graphs for rows of one token and all drafts only. These have a
    dispatcher of their own, and the same graphs' memory.
    """

    def __init__(self, dispatcher: Any, most: int) -> None:
        self._dispatcher, self._most = dispatcher, most

    @classmethod
    def of(cls, runner: Any, tokens: int) -> UniformSteps | None:
        """For a runner that has captured its graphs; None where it has no full ones.

        Nor where ranks agree on a size that not all of these have.
        """
        from vllm.config import CUDAGraphMode
        from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

        config, mode = runner.vllm_config, runner.cudagraph_dispatcher.cudagraph_mode
        if (
            mode.decode_mode() != CUDAGraphMode.FULL
            or not mode.separate_routine()
            or config.parallel_config.data_parallel_size > 1
            or config.compilation_config.pass_config.enable_sp
        ):
            return None
        compilation = copy.copy(config.compilation_config)
        # With drafts no more rows than vLLM captures with all of them.
        widest = runner.uniform_decode_query_len if tokens > 1 else 1
        most = compilation.max_cudagraph_capture_size // widest
        most = min(config.scheduler_config.max_num_seqs, most)
        compilation.cudagraph_capture_sizes = [tokens * rows for rows in row_sizes(most)]
        compilation.max_cudagraph_capture_size = tokens * most
        compilation.compile_sizes = []
        dispatcher = CudagraphDispatcher(config)
        dispatcher.compilation_config = compilation
        dispatcher.uniform_decode_query_len = tokens
        dispatcher.initialize_cudagraph_keys(mode, tokens)
        dispatcher.cudagraph_keys[CUDAGraphMode.PIECEWISE].clear()
        return cls(dispatcher, tokens * most)

    def are(self, batch: dict[str, Any]) -> bool:
        """Whether a batch is one of these; arguments that the runner looks for a graph with."""
        tokens: int = batch["num_tokens"]
        return tokens == batch["num_reqs"] * self._tokens and tokens <= self._most

    @property
    def _tokens(self) -> int:
        return int(self._dispatcher.uniform_decode_query_len)

    @contextmanager
    def used(self, runner: Any) -> Iterator[None]:
        """Have the runner take its graphs, and capture them, here."""
        before = runner.cudagraph_dispatcher, runner.uniform_decode_query_len
        runner.cudagraph_dispatcher = self._dispatcher
        runner.uniform_decode_query_len = self._tokens
        try:
            yield
        finally:
            runner.cudagraph_dispatcher, runner.uniform_decode_query_len = before


def row_sizes(most: int) -> list[int]:
    """Rows of captured batches of up to ``most``, ascending."""
    fine = range(_FINE, min(most, _COARSE_FROM), _FINE)
    return sorted({1, 2, 4, *fine, *range(_COARSE_FROM, most, _COARSE), most} & {*range(most + 1)})
