"""How much DELTA saves, on vLLM's own /metrics.

The tokens that a step attends to follow from a sequence's length and the plan, so counting costs
the device nothing; it happens where vLLM counts generated tokens, in its front process.
"""

from __future__ import annotations

import functools
from typing import Any

from deltadecode.engines.vllm.settings import Settings, attended_tokens

_active: Meter | None = None


class Meter:
    """Prometheus metrics of one engine.

    Parameters
    ----------
    settings : Settings
        Of its model.
    model_name : str
        Label ``model_name``.
    """

    def __init__(self, settings: Settings, model_name: str) -> None:
        self.settings = settings
        self._attended, self._full = (
            counter.labels(model_name=model_name) for counter in _counters()
        )
        config = settings.config
        _plan_info().labels(
            model_name=model_name,
            page_size=config.page_size,
            budget_pages=config.budget_pages,
            recent_pages=config.recent_pages,
            sink_pages=config.sink_pages,
            dense_layers=_numbers(config.dense_layers),
            delta_layers=_numbers(config.delta_layers),
        ).set(1)

    def add(self, tokens: int, steps: int) -> None:
        """Count decode steps of one sequence.

        Parameters
        ----------
        tokens : int
            In its cache at the last of the steps.
        steps : int
            Decode steps, one new token each.
        """
        lengths = range(tokens - steps + 1, tokens + 1)
        counts = [attended_tokens(self.settings, length) for length in lengths]
        self._attended.inc(sum(attended for attended, _ in counts))
        self._full.inc(sum(full for _, full in counts))


def describe(settings: Settings, longest: int) -> str:
    """The plan, and what it saves at most, for the log.

    Parameters
    ----------
    settings : Settings
        Of a model.
    longest : int
        Tokens of the longest sequence that the engine takes.

    Returns
    -------
    str
        One line.
    """
    config = settings.config
    attended, full = attended_tokens(settings, longest)
    pages = f"{config.recent_pages} recent, {config.sink_pages} sink"
    sync = ", selection over the heads of all ranks" if settings.sync_heads else ""
    return (
        f"dense layers {_numbers(config.dense_layers) or 'none'}, "
        f"Δ-layers {_numbers(config.delta_layers)}, {config.budget_pages} pages of "
        f"{config.page_size} tokens ({pages}){sync}; "
        f"a step at {longest} tokens attends to {attended / full:.1%} of them"
    )


def install(settings: Settings, model_name: str) -> None:
    """Count from now on, in this process.

    Parameters
    ----------
    settings : Settings
        Of the engine.
    model_name : str
        As it is served.
    """
    global _active
    from vllm.v1.engine.output_processor import OutputProcessor

    _active = Meter(settings, model_name)
    update = OutputProcessor._update_stats_from_output
    if hasattr(update, "_deltadecode"):
        return

    @functools.wraps(update)
    def _update_stats_from_output(
        self: Any, req_state: Any, engine_core_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        first = req_state.is_prefilling
        result = update(self, req_state, engine_core_output, *args, **kwargs)
        if _active is not None and req_state.stats is not None:
            # The first token comes from the prompt, and the newest is not in the cache yet.
            steps = len(engine_core_output.new_token_ids) - int(first)
            tokens = req_state.prompt_len + req_state.stats.num_generation_tokens - 1
            _active.add(tokens, steps)
        return result

    _update_stats_from_output._deltadecode = True  # type: ignore[attr-defined]
    OutputProcessor._update_stats_from_output = _update_stats_from_output


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

    labels = ("page_size", "budget_pages", "recent_pages", "sink_pages")
    return Gauge(
        "deltadecode_plan",
        "The active plan; always 1.",
        ["model_name", *labels, "dense_layers", "delta_layers"],
        multiprocess_mode="mostrecent",
    )


def _numbers(layers: Any) -> str:
    return " ".join(map(str, layers))
