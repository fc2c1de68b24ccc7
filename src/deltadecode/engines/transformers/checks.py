"""What cannot work with DELTA, refused in one line before anything has run."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.modeling_utils import PreTrainedModel

from deltadecode.engines.transformers.cache import DeltaCache
from deltadecode.engines.transformers.offload import DeltaOffloadedCache
from deltadecode.engines.transformers.offload_checks import (
    check_host,
    check_offload,
    check_offloaded,
)
from deltadecode.engines.transformers.state import ModelState
from deltadecode.engines.transformers.static_cache import DeltaStaticCache
from deltadecode.errors import ArgumentError, UnsupportedCacheError


def check_cache(cache: Any, state: ModelState) -> None:
    """Refuse a cache of another kind, of another model, or for smaller pages.

    Raises
    ------
    UnsupportedCacheError
        Naming the class of the cache.
    """
    if cache is None:
        return
    if not isinstance(cache, (DeltaCache, DeltaStaticCache)):
        raise UnsupportedCacheError(
            f"DELTA decodes from a DeltaCache or DeltaStaticCache, got a {type(cache).__name__}; "
            "pass no past_key_values, or DeltaCache(model.config); PEFT prefix tuning cannot be "
            "combined with it"
        )
    if state.draft_tokens and isinstance(cache, DeltaStaticCache) and not cache.is_croppable:
        raise UnsupportedCacheError(
            "lossless decoding needs a cache that takes drafts back, got a DeltaStaticCache with "
            "rings for sliding windows; make it with lossless=True"
        )
    if isinstance(cache, DeltaOffloadedCache):
        check_offloaded(cache, state)
    elif state.draft_tokens and isinstance(cache, DeltaCache) and cache.kv_dtype is not None:
        raise UnsupportedCacheError(
            f"lossless decoding gives what full attention gives, got a cache of {cache.kv_dtype}, "
            "which rounds keys and values"
        )
    if cache.num_layers != state.plan.num_layers:
        raise UnsupportedCacheError(
            f"the {type(cache).__name__} must be of this model with {state.plan.num_layers} layers,"
            f" got one of {cache.num_layers} layers"
        )
    if isinstance(cache, DeltaStaticCache) and cache.page_size < state.cfg.page_size:
        raise UnsupportedCacheError(
            f"the DeltaStaticCache must be made for pages of {state.cfg.page_size} tokens, got one "
            f"for pages of up to {cache.page_size}"
        )


def check_rows(cache: DeltaStaticCache, mask: Any, tokens: int) -> None:
    """Refuse rows that do not fit in a static cache with ``tokens`` slots, or that have gaps.

    Raises
    ------
    ArgumentError
        Naming both numbers, or the row and slot of the gap.
    """
    if tokens > cache.room:
        raise ArgumentError(
            f"the static cache has room for {cache.room} tokens, got {tokens}; make a larger one"
        )
    check_gaps(mask, tokens)


def check_gaps(mask: Any, tokens: int) -> None:
    """Refuse rows of a static cache with padding anywhere but on the left.

    Raises
    ------
    ArgumentError
        Naming the row and the slot.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return
    seen = mask[:, :tokens].bool()
    gaps = (seen[:, :-1] & ~seen[:, 1:]).nonzero().tolist()
    if gaps:
        row, slot = gaps[0]
        raise ArgumentError(
            "with a static cache DELTA takes padding on the left only, got an attention_mask with "
            f"padding in slot {slot + 1} of row {row}, behind its tokens; use the default cache"
        )


def check_attentions(wanted: Any) -> None:
    """Refuse to return attention weights.

    Raises
    ------
    ArgumentError
        When it is true.
    """
    if wanted:
        raise ArgumentError(
            f"output_attentions={wanted!r} is not possible with DELTA: sparse layers have no "
            "weights for the tokens they do not read; call deltadecode.disable(model) first"
        )


def check_prompt(tokens: int, mask: Any, state: ModelState) -> None:
    """Refuse a prompt longer than the model's positions; ``tokens`` includes cache and padding.

    Raises
    ------
    ArgumentError
        Naming both numbers.
    """
    if state.longest is None or tokens <= state.longest:
        return
    if isinstance(mask, Tensor) and mask.dim() == 2:
        tokens = int(mask.sum(dim=1).max())
    if tokens > state.longest:
        raise ArgumentError(
            f"the prompt must not be longer than the model's {state.longest} positions, got "
            f"{tokens} tokens"
        )


def check_generate(model: PreTrainedModel, state: ModelState, arguments: dict[str, Any]) -> int:
    """Refuse what ``generate`` cannot do with DELTA.

    Returns
    -------
    int
        Tokens of the longest row before the first new one, cache and padding included.

    Raises
    ------
    UnsupportedCacheError
        For a cache of another kind.
    ArgumentError
        For attention weights, assisted decoding, or a prompt that is too long.
    """
    settings = _settings(model, arguments)
    # "hybrid" stands in older checkpoints, and ``generate`` itself takes no notice of it.
    if settings.cache_implementation not in (None, "dynamic", "static", "offloaded", "hybrid"):
        raise UnsupportedCacheError(
            "DELTA decodes from a DeltaCache, DeltaStaticCache or DeltaOffloadedCache, got "
            f"cache_implementation={settings.cache_implementation!r}; leave it unset, or 'static' "
            "or 'offloaded'"
        )
    if state.kv_dtype is not None and settings.cache_implementation == "static":
        raise UnsupportedCacheError(
            f"a static cache holds the model's type, got kv_dtype={state.kv_dtype!r}; leave "
            "cache_implementation unset, or take 'offloaded'"
        )
    check_attentions(settings.output_attentions)
    mode = settings.get_generation_mode(arguments.get("assistant_model"))
    if state.draft_tokens:
        _check_lossless(settings, mode, arguments)
    if mode == GenerationMode.ASSISTED_GENERATION:
        raise ArgumentError(
            "assisted decoding (assistant_model, prompt_lookup_num_tokens, ...) is not possible "
            "with DELTA: it selects pages for one new token at a time, not for several drafted ones"
        )
    cache = arguments.get("past_key_values")
    check_cache(cache, state)
    mask = arguments.get("attention_mask")
    tokens = 0
    for name in ("inputs", "input_ids", "inputs_embeds", "attention_mask"):
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.dim() > 1:
            tokens = max(tokens, value.shape[1])
    check_prompt(tokens, mask, state)
    rows, stored = _rows(settings, arguments), _stored(settings, tokens)
    if isinstance(cache, DeltaOffloadedCache):
        check_host(model, cache, rows, stored, tokens)
    elif settings.cache_implementation == "offloaded" and cache is None:
        check_offload(model, state, rows, stored, tokens)
    if isinstance(cache, DeltaStaticCache):
        check_rows(cache, mask, stored)
    elif settings.cache_implementation == "static":
        check_gaps(mask, tokens)
    return tokens


def _check_lossless(
    settings: GenerationConfig, mode: GenerationMode, arguments: dict[str, Any]
) -> None:
    """Refuse what cannot be drafted and verified.

    Raises
    ------
    UnsupportedCacheError
        For no cache.
    ArgumentError
        For beam search, another assistant, a loop of the user's own, hidden states, or guidance.
    """
    if settings.use_cache is False:
        raise UnsupportedCacheError(
            "lossless decoding needs a cache, which takes drafts back, got use_cache=False"
        )
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ArgumentError(
            f"lossless decoding is greedy or samples, and has no other assistant, got {mode.value}"
        )
    for name in ("custom_generate", "output_hidden_states", "guidance_scale", "synced_gpus"):
        value = arguments.get(name, getattr(settings, name, None))
        if (
            value is not None
            and value is not False
            and not (name == "guidance_scale" and value == 1)
        ):
            raise ArgumentError(f"lossless decoding cannot be combined with {name}, got {value!r}")


def _rows(settings: GenerationConfig, arguments: dict[str, Any]) -> int:
    """Rows that a call of ``generate`` decodes."""
    given = (arguments.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    rows = next((value.shape[0] for value in given if isinstance(value, Tensor)), 1)
    return int(rows) * max(settings.num_beams or 1, settings.num_return_sequences or 1)


def _stored(settings: GenerationConfig, tokens: int) -> int:
    """Tokens that a call of ``generate`` stores, at most: the last new one is not."""
    if settings.max_new_tokens is not None:
        return tokens + int(settings.max_new_tokens) - 1
    if settings.max_length is not None:
        return max(tokens, int(settings.max_length) - 1)
    return tokens


def _settings(model: PreTrainedModel, arguments: dict[str, Any]) -> GenerationConfig:
    """The generation settings in force: the call's, else the given ones, else the model's."""
    config = arguments.get("generation_config")
    settings = copy.copy(model.generation_config if config is None else config)
    for name in vars(settings):
        value = arguments.get(name)
        if value is None:
            value = getattr(settings, name)
        if value is None:
            value = getattr(model.generation_config, name, None)
        setattr(settings, name, value)
    return settings
