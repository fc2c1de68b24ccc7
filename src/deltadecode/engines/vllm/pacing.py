"""How many drafts a batch makes in lossless mode: decided by the scheduler, for all ranks."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from deltadecode.engines.serving.drafting import Acceptance, Worth, kept_tokens
from deltadecode.engines.serving.settings import ServingSettings
from deltadecode.engines.times import Times
from deltadecode.engines.vllm.checks import FLOAT8_DTYPES

clock = time.perf_counter

# Rounds that pay are compared with plain steps so often, at first sooner, and with so many: the
# first two of them verify what was drafted, or come behind the one that does.
_REFRESH, _SOON, _COMPARED = 256, 16, 4


def pace_drafts(scheduler: Any, settings: ServingSettings) -> None:
    """Have a scheduler ask for as many drafts as pay, and reserve slots for them.

    vLLM does the latter for the proposers that it knows to write into a cache.
    """
    scheduler.num_lookahead_tokens = scheduler.num_spec_tokens
    pacing = Pacing(scheduler, settings)
    # vLLM looks up by the number of rows how many drafts to make: its schedules by batch size.
    scheduler.dynamic_sd_lookup = pacing
    update = scheduler.update_from_output

    def update_from_output(scheduler_output: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        pacing.measure(scheduler_output, output)
        outputs = update(scheduler_output, output, *args, **kwargs)
        if not scheduler.running:
            pacing.pause()
        return outputs

    scheduler.update_from_output = update_from_output


class Pacing:
    """Drafts of a batch, by what is known of it before it runs; indexed by its number of rows.

    A batch drafts where bytes and acceptance say that it may pay, and ends where steps have taken
    longer for each token than without drafts. Times are kept by the size of a batch and of its
    cache.
    """

    def __init__(self, scheduler: Any, settings: ServingSettings) -> None:
        self._scheduler = scheduler
        self._worth = Worth(
            settings, *step_bytes(scheduler.vllm_config), int(scheduler.num_spec_tokens)
        )
        self._acceptance = Acceptance()
        config = scheduler.vllm_config
        self._ahead = bool(config.scheduler_config.async_scheduling)
        # Where each rank has a scheduler of its own, all have to decide alike.
        launcher = config.parallel_config.distributed_executor_backend
        self._timed = not self._worth.told and launcher != "external_launcher"
        self._shapes: dict[tuple[int, int], Times] = {}
        self._times: Times | None = None
        self._ended, self._before, self._rounds = 0.0, "", 0

    def __getitem__(self, rows: int) -> int:
        """Drafts of each row behind the step that is being scheduled; 0 for none."""
        running = self._scheduler.running
        lengths = np.array([request.num_tokens for request in running])
        self._times = None
        if self._ahead:
            for request in running:
                # Of one that this step leaves out: its drafts will not be there any more.
                request.spec_token_ids = []
        if not len(lengths) or not self._worth.may_pay(lengths):
            return 0
        # Where the user has said from where on to draft, no chance plays a part.
        known = [] if self._worth.told else [request.request_id for request in running]
        drafts = self._worth.drafts(lengths, self._acceptance.of(known))
        if not drafts or not self._timed:
            return drafts
        shape = len(lengths).bit_length(), int(lengths.sum()).bit_length()
        if shape not in self._shapes:
            self._shapes[shape], self._rounds = Times(), 0
            if self._before == "drafts":
                self._shapes[shape].rest = 0  # a batch that grows goes on
        self._times = times = self._shapes[shape]
        if times.rest > 0:
            times.rest -= 1
            return 0
        return drafts

    def measure(self, step: Any, output: Any) -> None:
        """Take in what a step has given, and when it ended."""
        if self._worth.told:
            return
        rows, verified = output.req_id_to_index, step.scheduled_spec_decode_tokens
        for name, drafts in verified.items():
            kept = len(output.sampled_token_ids[rows[name]]) if name in rows else 0
            if kept:
                self._acceptance.measure(name, len(drafts), kept)
        if not verified:
            self._acceptance.rest()
        self._acceptance.forget(step.finished_req_ids)
        before, ended = self._before, self._ended
        self._before, self._ended = self._kind(step), clock()
        # The end of a step is that of its drafts, too. One behind a step of another kind, or
        # beside prompts, says nothing.
        times = self._times if self._before == before else None
        if times is None:
            return
        if self._before == "plain":
            times.add_plain(self._ended - ended)
        elif self._before == "drafts":
            # One round may be lucky: what it gives by the chances.
            most = max(map(len, verified.values()))
            tokens = kept_tokens(most, self._acceptance.of(verified))
            times.add_round(self._ended - ended, tokens)
            self._rounds += 1
            if times.rest == 0 and self._rounds >= (_REFRESH if times.plain else _SOON):
                times.rest, self._rounds = _COMPARED, 0

    def pause(self) -> None:
        """Forget when the last step ended: nothing runs."""
        self._before = ""

    def _kind(self, step: Any) -> str:
        verified = step.scheduled_spec_decode_tokens
        tokens = len(step.num_scheduled_tokens) + sum(map(len, verified.values()))
        if tokens != step.total_num_scheduled_tokens:
            return ""
        if not verified:
            return "" if step.num_spec_tokens_to_schedule else "plain"
        return "drafts" if step.num_spec_tokens_to_schedule else ""


def step_bytes(vllm_config: Any) -> tuple[int, int]:
    """Bytes of the weights that a step reads, about, and of a token's keys and values."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    text, number = model.hf_text_config, model.dtype.itemsize
    layers, hidden = text.num_hidden_layers, text.hidden_size
    heads, kv_heads = text.num_attention_heads, model.get_total_num_kv_heads()
    size = model.get_head_size()
    experts = getattr(text, "num_experts_per_tok", None)
    inner = experts and getattr(text, "moe_intermediate_size", None)
    inner = inner or getattr(text, "intermediate_size", None) or 4 * hidden
    layer = 2 * hidden * size * (heads + kv_heads) + 3 * hidden * inner * (experts or 1)
    weights = number * (layers * layer + hidden * model.get_vocab_size())
    number = 1 if cache.cache_dtype in FLOAT8_DTYPES else number
    return weights, 2 * layers * kv_heads * size * number
