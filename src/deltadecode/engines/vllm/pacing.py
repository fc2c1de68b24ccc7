"""How many drafts a batch makes in lossless mode: decided by the scheduler, for all ranks."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from deltadecode.engines.serving.drafting import Worth
from deltadecode.engines.serving.settings import ServingSettings
from deltadecode.engines.vllm.checks import FLOAT8_DTYPES

clock = time.perf_counter


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
        return update(scheduler_output, output, *args, **kwargs)

    scheduler.update_from_output = update_from_output


class Pacing:
    """Drafts of a batch, by what is known of it before it runs; indexed by its number of rows."""

    def __init__(self, scheduler: Any, settings: ServingSettings) -> None:
        self._scheduler, self._drafts = scheduler, scheduler.num_spec_tokens
        self._worth = Worth(settings, *step_bytes(scheduler.vllm_config), self._drafts)
        self._ended = 0.0

    def __getitem__(self, rows: int) -> int:
        """Drafts of each row behind the step that is being scheduled; 0 for none."""
        lengths = np.array([request.num_tokens for request in self._scheduler.running])
        return self._drafts if len(lengths) and self._worth.pays(lengths) else 0

    def measure(self, step: Any, output: Any) -> None:
        """Take in what a step has given, and how long it took."""
        rows = output.req_id_to_index
        verified = step.scheduled_spec_decode_tokens
        kept = [len(output.sampled_token_ids[rows[name]]) for name in verified]
        self._worth.measure([tokens for tokens in kept if tokens])


def step_bytes(vllm_config: Any) -> tuple[int, int]:
    """Bytes of the weights that a step reads, about, and of a token's keys and values."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    text, number = model.hf_text_config, model.dtype.itemsize
    layers, hidden = text.num_hidden_layers, text.hidden_size
    heads, kv_heads = text.num_attention_heads, model.get_total_num_kv_heads()
    size = model.get_head_size()
    experts = getattr(text, "num_experts_per_tok", None)
    inner = (experts and getattr(text, "moe_intermediate_size", None)) or text.intermediate_size
    layer = 2 * hidden * size * (heads + kv_heads) + 3 * hidden * inner * (experts or 1)
    weights = number * (layers * layer + hidden * model.get_vocab_size())
    number = 1 if cache.cache_dtype in FLOAT8_DTYPES else number
    return weights, 2 * layers * kv_heads * size * number
