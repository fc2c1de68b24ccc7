"""How much DELTA saves, on vLLM's own /metrics.

The scheduler of an engine counts the rows that it has run. The counts go to the front process
with the scheduler's own statistics, and there into Prometheus counters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltadecode.engines.serving.counts import StepCounts, layer_numbers
from deltadecode.engines.serving.settings import KEY, ServingSettings
from deltadecode.engines.vllm import versions
from deltadecode_vllm import is_lossless, wrap_once


def count_steps(scheduler: Any, settings: ServingSettings) -> None:
    """Let one scheduler count its decode rows, and send the counts with its statistics."""
    counts = StepCounts(settings)
    most = versions.most_tokens(scheduler.vllm_config)
    lossless = is_lossless(scheduler.vllm_config)
    model_name = str(scheduler.vllm_config.model_config.served_model_name)
    update, make_stats = scheduler.update_from_output, scheduler.make_stats

    rows = DecodeRows(scheduler, most)

    def update_from_output(scheduler_output: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        if lossless:
            names, tokens, new_tokens = rows.of(scheduler_output)
            places = output.req_id_to_index
            kept = [len(output.sampled_token_ids[places[name]]) for name in names]
            counts.add_verifications(tokens, new_tokens, kept)
        else:
            steady = rows.steady(scheduler_output)
            if steady is None:
                counts.add(*rows.of(scheduler_output)[1:])
            else:
                counts.add(steady)
        return update(scheduler_output, output, *args, **kwargs)

    def make_stats_with_counts(*args: Any, **kwargs: Any) -> Any:
        stats = make_stats(*args, **kwargs)
        if stats is not None and counts.full:
            # The one field that takes any value; install() takes ours out again.
            others = stats.kv_connector_stats or {}
            stats.kv_connector_stats = {**others, KEY: [model_name, *counts.take()]}
        return stats

    scheduler.update_from_output = update_from_output
    scheduler.make_stats = make_stats_with_counts


class DecodeRows:
    """The decode rows of a scheduler's steps, when they have run.

    Not rows of prompts, which every new request begins with, nor of requests that have ended
    meanwhile. Rows of more than ``most`` tokens are computed again, after a preemption: prefill. A
    step's own results are not in the scheduler's requests yet, while those of earlier steps are.
    """

    def __init__(self, scheduler: Any, most: int) -> None:
        self._scheduler, self._most = scheduler, most
        # Of the step before.
        self._names: list[str] = []
        self._running: list[Any] = []
        self._last = 0
        self._prompts: NDArray[np.int64] | None = None

    def of(self, step: Any) -> tuple[list[str], list[int], list[int]]:
        """Of each row its request, its tokens up to the first new one, and its new tokens."""
        names: list[str] = []
        tokens: list[int] = []
        new_tokens: list[int] = []
        cached, requests = step.scheduled_cached_reqs, self._scheduler.requests
        # Those have not ended, which takes longer to ask than anything else here.
        running = {request.request_id for request in self._scheduler.running}
        for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            request = requests.get(name)
            if request is None or computed < request.num_prompt_tokens:
                continue
            new = step.num_scheduled_tokens[name]
            if new <= self._most and (name in running or not request.is_finished()):
                # With asynchronous scheduling drafts count as computed that are then rejected.
                known = request.num_tokens
                names.append(name)
                tokens.append(computed + 1 if computed < known else known)
                new_tokens.append(new)
        return names, tokens, new_tokens

    def steady(self, step: Any) -> NDArray[np.int64] | None:
        """Tokens of each row where the same requests go on by one token each, else None.

        They are those that :meth:`of` gives, but no Python runs for each row.
        """
        cached, running = step.scheduled_cached_reqs, self._scheduler.running
        names = cached.req_ids
        # Requests that end, or are preempted, leave the running ones. One that goes on with more of
        # a prompt may come back to where it was: behind all others.
        last = running[-1].num_prompt_tokens if running else 0
        if names != self._names or running != self._running or last != self._last:
            self._names, self._running, self._prompts = names, list(running), None
            self._last = last
            return None
        if self._most > 1 or step.total_num_scheduled_tokens != len(names):
            return None
        if self._prompts is None:
            prompts = {request.request_id: request.num_prompt_tokens for request in running}
            if not prompts.keys() >= set(names):
                return None
            self._prompts = np.array([prompts[name] for name in names], dtype=np.int64)
        computed = np.array(cached.num_computed_tokens, dtype=np.int64)
        tokens: NDArray[np.int64] = computed[computed >= self._prompts] + 1
        return tokens


def install(settings: ServingSettings, model_name: str) -> None:
    """Show a new engine's plan, and read counts where they reach this process."""
    from vllm.v1.engine.output_processor import OutputProcessor

    config = settings.config
    _plan_info().labels(
        model_name=model_name,
        page_size=config.page_size,
        budget_pages=config.budget_pages,
        budget_share=config.budget_share,
        recent_pages=config.recent_pages,
        sink_pages=config.sink_pages,
        dense_layers=layer_numbers(config.dense_layers),
        delta_layers=layer_numbers(config.delta_layers),
    ).set(1)
    for counter in _counters():
        counter.labels(model_name=model_name)
    wrap_once(OutputProcessor, "update_scheduler_stats", _read_counts)


def _read_counts(update: Callable[..., None]) -> Any:
    def update_scheduler_stats(self: Any, stats: Any, *args: Any, **kwargs: Any) -> None:
        sent = getattr(stats, "kv_connector_stats", None)
        if sent and KEY in sent:
            model_name, *counts = sent.pop(KEY)
            stats.kv_connector_stats = sent or None
            for counter, count in zip(_counters(), counts, strict=True):
                counter.labels(model_name=model_name).inc(count)
        update(self, stats, *args, **kwargs)

    return update_scheduler_stats


@functools.cache
def _counters() -> tuple[Any, Any]:
    from prometheus_client import Counter

    return (
        Counter(
            "deltadecode_attended_tokens",
            "Tokens attended to, over decode steps and planned layers.",
            ["model_name"],
        ),
        Counter(
            "deltadecode_full_tokens",
            "Tokens that full attention would have attended to in the same steps and layers.",
            ["model_name"],
        ),
    )


@functools.cache
def _plan_info() -> Any:
    from prometheus_client import Gauge

    labels = ("page_size", "budget_pages", "budget_share", "recent_pages", "sink_pages")
    return Gauge(
        "deltadecode_plan",
        "The active plan; always 1.",
        ["model_name", *labels, "dense_layers", "delta_layers"],
        multiprocess_mode="mostrecent",
    )
