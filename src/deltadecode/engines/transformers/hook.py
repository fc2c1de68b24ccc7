"""What runs before each forward pass of a decoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from deltadecode.engines.transformers.cache import DeltaCache
from deltadecode.engines.transformers.checks import (
    check_attentions,
    check_cache,
    check_prompt,
    check_rows,
)
from deltadecode.engines.transformers.layer_graphs import unwrap_layers
from deltadecode.engines.transformers.offload import DeltaOffloadedCache
from deltadecode.engines.transformers.offload_checks import check_host
from deltadecode.engines.transformers.state import ModelState
from deltadecode.engines.transformers.static_cache import DeltaStaticCache
from deltadecode.engines.transformers.step import Step

FirstUse = Callable[[PreTrainedModel], "ModelState | None"]


class ForwardHook:
    """Runs before each forward pass of a decoder; does nothing while another attention is set.

    Attributes
    ----------
    state : ModelState or None
        None on a model that was loaded by name, until its first use.
    first_use : callable or None
        Binds such a model and gives its state, or None.
    """

    def __init__(self, state: ModelState | None = None, first_use: FirstUse | None = None) -> None:
        self.state, self.first_use = state, first_use
        # Names of the positional arguments; looked up once, since compilers trace the calls.
        self.names: tuple[str, ...] = ()

    def install(self, model: PreTrainedModel) -> None:
        """Stand before a model's forward passes from now on."""
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Check a call of ``model.forward``, complete its arguments, and decide what the pass is.

        Returns
        -------
        tuple or None
            Arguments to call it with instead; None: unchanged.
        """
        state = self.state
        if state is not None and state.graphs is not None:
            _forget_graphs(model, state)
        if state is None and self.first_use is not None:
            state = _bound_here(model, self.first_use)
        if state is None or not state.active:
            return None
        if args:
            kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        wanted = kwargs.get("output_attentions")
        check_attentions(model.config.output_attentions if wanted is None else wanted)
        cache = kwargs.get("past_key_values")
        check_cache(cache, state)
        static = cache if isinstance(cache, DeltaStaticCache) else None
        tokens = kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        new = tokens.shape[1] if isinstance(tokens, Tensor) else 0
        # The length of a static cache is on its device, where a compiled graph leaves it. Lossless
        # decoding has checked all of its passes before the first.
        readable = static is None or not (
            torch.compiler.is_compiling() or state.local.drafting is not None
        )
        if readable and (static is not None or new > 1):
            past = 0 if cache is None else int(cache.get_seq_length())
            mask = kwargs.get("attention_mask")
            if new > 1:
                check_prompt(past + new, mask, state)
            if static is not None:
                check_rows(static, mask, past + new)
        if cache is None:
            wanted = kwargs.get("use_cache")
            if getattr(model.config, "use_cache", False) if wanted is None else wanted:
                kv_dtype = state.kv_dtype
                if kv_dtype and torch.is_grad_enabled() and _needs_gradients(model, tokens, None):
                    kv_dtype = None  # what is rounded has none
                cache = DeltaCache(model.config, kv_dtype=kv_dtype)
                kwargs = {**kwargs, "past_key_values": cache}
        full = torch.is_grad_enabled() and _needs_gradients(model, tokens, cache)
        state.static.active = static is not None
        if static is not None:
            state.static.decodes = new == 1 and not state.static.prefilling
            state.static.full, state.static.tokens = full, new
        else:
            if isinstance(cache, DeltaOffloadedCache) and isinstance(tokens, Tensor):
                end = int(cache.get_seq_length()) + new
                # Before a layer has the new tokens: one that found no room would leave others with.
                if new > 1 or cache.shared.outgrown(end):
                    check_host(model, cache, len(tokens), end)
            begin = _begin_uncompiled if torch.compiler.is_dynamo_compiling() else _begin
            begin(state, new == 1 and cache is not None, full, cache)
            if state.graphs is not None and not torch.compiler.is_compiling():
                _begin_graphs(model, state, cache, kwargs)
        return (), kwargs


def _begin(state: ModelState, one: bool, full: bool, cache: Any) -> None:
    """Begin a pass from any cache but a static one; what is exported is full attention."""
    decodes = one and not state.local.prefilling and not torch.compiler.is_compiling()
    apart = cache if isinstance(cache, DeltaCache) and cache.apart else None
    state.local.step = Step(decodes, full, apart)
    if apart is not None:
        apart.begin(decodes and not full)
    if isinstance(cache, DeltaOffloadedCache):
        state.stats.offload.follow(cache)


@torch.compiler.disable
def _begin_graphs(
    model: PreTrainedModel, state: ModelState, cache: Any, kwargs: dict[str, Any]
) -> None:
    """Let a decode step use layer graphs."""
    step = state.local.step
    if state.graphs is not None and step is not None and step.decodes and not step.full:
        state.local.graphed = state.graphs.begin(model, state, cache, kwargs)


@torch.compiler.disable
def _forget_graphs(model: PreTrainedModel, state: ModelState) -> None:
    """Begin a pass without layer graphs; a step that broke off may have left some."""
    state.local.graphed = None
    if getattr(model, "_is_replica", False):  # its layers would run those of the model
        unwrap_layers(model)


# What a compiled graph writes to a ``threading.local`` is lost.
_begin_uncompiled = torch.compiler.disable(_begin)


def _needs_gradients(model: PreTrainedModel, tokens: Any, cache: Any) -> bool:
    # Through the cache they reach what the prompt was computed from, as soft prompts.
    held = [] if cache is None else [getattr(layer, "keys", None) for layer in cache.layers]
    if any(isinstance(part, Tensor) and part.requires_grad for part in (tokens, *held)):
        return True
    return any(parameter.requires_grad for parameter in model.parameters())


@torch.compiler.disable
def _bound_here(model: PreTrainedModel, first_use: FirstUse) -> ModelState | None:
    """State of a model at its first use, if it is the decoder itself: its new hook comes late."""
    state = first_use(model)
    hooks = model._forward_pre_hooks.values()
    here = any(isinstance(hook, ForwardHook) and hook.state is state for hook in hooks)
    return state if here else None
