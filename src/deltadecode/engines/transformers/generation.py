"""The methods of ``generate`` that DELTA wraps, once, on Transformers' own class.

They look up the binding of the model they are called on, and do nothing where there is none.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import StaticCache
from transformers.generation.utils import GenerationMixin

from deltadecode.engines.transformers.bind import find_state
from deltadecode.engines.transformers.cache import DeltaCache
from deltadecode.engines.transformers.checks import check_generate
from deltadecode.engines.transformers.offload import DeltaOffloadedCache
from deltadecode.engines.transformers.speculation import Speculation
from deltadecode.engines.transformers.state import ModelState
from deltadecode.engines.transformers.static_cache import DeltaStaticCache, replace_static

Method = Callable[..., Any]
_LOOP = ("input_ids", "logits_processor", "stopping_criteria", "generation_config", "streamer")


def _generate(stock: Method, state: ModelState, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse what cannot work before anything has run."""
    arguments = _arguments_of(stock, (model, *args), kwargs)
    state.local.prompt = check_generate(model, state, arguments)
    try:
        _reserve(state, arguments.get("past_key_values"))
        return stock(model, *args, **kwargs)
    finally:
        if state.local.reserving is not None:
            state.local.reserving.reserve = 0
        state.local.prompt, state.local.reserving = 0, None


def _reserve(state: ModelState, cache: Any) -> None:
    """Let an offloaded cache take host memory for a whole prompt at once, in this call alone."""
    if isinstance(cache, DeltaOffloadedCache):
        state.local.reserving = cache.shared
        cache.shared.reserve = state.local.prompt


def _prepare_cache_for_generation(
    stock: Method,
    state: ModelState,
    model: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Let the class make a cache, and put one of ours in its place."""
    users_cache = model_kwargs.get("past_key_values")
    offloaded = users_cache is None and generation_config.cache_implementation == "offloaded"
    if offloaded:
        # The class's own takes a stream at once, which a CUDA build without a driver does not have.
        generation_config.cache_implementation = "dynamic"
    try:
        result = stock(model, generation_config, model_kwargs, *args, **kwargs)
    finally:
        if offloaded:
            generation_config.cache_implementation = "offloaded"
    made = model_kwargs.get("past_key_values")
    if users_cache is None and made is not None:
        cache: DeltaCache | DeltaStaticCache
        if isinstance(made, StaticCache):
            cache = replace_static(made, model.config, state.cfg.page_size, state.draft_tokens)
            # With buffers already made, chunks of the prompt run compiled: the last moment.
            for number, layer in enumerate(cache.layers):
                keys = getattr(layer, "keys", None)
                if keys is not None:
                    state.prepare_counts(number, keys.device)
        elif offloaded:
            cache = DeltaOffloadedCache(model.config, state.cfg, kv_dtype=state.kv_dtype)
        else:
            cache = DeltaCache(model.config, kv_dtype=state.kv_dtype)
        _reserve(state, cache)
        model_kwargs["past_key_values"] = cache
        if generation_config.is_assistant:
            cache.activate_past_recording()
    return result


def _prefill(
    stock: Method,
    state: ModelState,
    model: Any,
    input_ids: Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Mark the passes as prefill, down to a last chunk of one token (R1).

    Unless only one token is new: behind a cache it goes on where decoding stopped, and must give
    what it would have given then.
    """
    cache = model_kwargs.get("past_key_values")
    kept = state.kept_cache if isinstance(cache, DeltaStaticCache) else None
    if kept is not None and not kept.lend(cache, len(input_ids)):
        state.kept_cache = None  # before there is memory for another
    past = 0 if cache is None else int(cache.get_seq_length())
    mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
    if embeds is not None:
        new = embeds.shape[1] - past
    else:
        # As the class does it: a prompt as long as its mask includes what the cache holds.
        seen = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        new = input_ids.shape[1] - (past if seen == input_ids.shape[1] else 0)
    state.local.prefilling = state.static.prefilling = new != 1
    try:
        return stock(model, input_ids, generation_config, model_kwargs, *args, **kwargs)
    finally:
        state.local.prefilling = state.static.prefilling = False


def _sample(
    stock: Method,
    state: ModelState,
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """In lossless mode, draft and verify instead of one step after the other."""
    given = input_ids, logits_processor, stopping_criteria, generation_config
    # As the assistant of another model, what it gives is only drafts.
    if not state.draft_tokens or generation_config.is_assistant:
        return stock(model, *given, *args, **kwargs)
    named = _arguments_of(stock, (model, *given, *args), kwargs)
    for name in ("self", "synced_gpus"):
        named.pop(name, None)
    of_loop = {name: named.pop(name, None) for name in _LOOP}
    return Speculation(model, state, **of_loop, model_kwargs=named).run()


def wrap_generation() -> None:
    """Wrap the methods; called once, when the package is imported."""
    for method, run in (
        ("generate", _generate),
        ("_prepare_cache_for_generation", _prepare_cache_for_generation),
        ("_prefill", _prefill),
        ("_sample", _sample),
    ):
        setattr(GenerationMixin, method, _wrapped(getattr(GenerationMixin, method), run))


def _wrapped(stock: Method, run: Callable[..., Any]) -> Method:
    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = find_state(self)
        if state is None:
            return stock(self, *args, **kwargs)
        return run(stock, state, self, *args, **kwargs)

    return method


def _arguments_of(
    function: Method, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of a call by name, those in ``**kwargs`` included, and only what was given."""
    signature = inspect.signature(function)
    named = dict(signature.bind_partial(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named
