"""Turning DELTA on and off for one model: ``enable``, ``disable``, ``stats``."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from deltadecode.architecture import text_config
from deltadecode.config import DeltaConfig
from deltadecode.engines.transformers.cache import DeltaCache
from deltadecode.engines.transformers.checks import (
    check_attentions,
    check_cache,
    check_model,
    check_prompt,
    check_rows,
)
from deltadecode.engines.transformers.overrides import OVERRIDES, Override
from deltadecode.engines.transformers.state import (
    ModelState,
    drop_state,
    find_state,
    set_state,
)
from deltadecode.engines.transformers.static_cache import DeltaStaticCache
from deltadecode.engines.transformers.stats import DecodeStats

NAME = "delta"


def enable(model: PreTrainedModel, cfg: DeltaConfig | None = None) -> None:
    """Decode with DELTA from now on (arXiv 2510.09883; docs/semantics.md).

    The model's own ``generate`` and ``forward`` then attend to selected pages in sparse layers at
    every decode step. Weights are not touched. Enabling again takes the new configuration and
    starts new counts.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder-only model of Transformers, already loaded.
    cfg : DeltaConfig, optional
        Plan and budget; by default :meth:`DeltaConfig.for_model`.

    Raises
    ------
    UnsupportedModelError
        When the model has nothing that could be planned, naming its class.
    DeltaConfigError
        When the plan does not fit the model; the model is then unchanged.
    ValueError
        When the model is set to return attention weights.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel, got {type(model).__name__}")
    if cfg is not None and not isinstance(cfg, DeltaConfig):
        raise TypeError(f"cfg must be a DeltaConfig, got {type(cfg).__name__}")
    check_model(model)
    check_attentions(model.config.output_attentions)
    config = text_config(model)
    set_state(config, cfg)
    hook = find_hook(model)
    previous = hook.previous if hook is not None else config._attn_implementation
    _set_implementation(model, config, NAME)
    for part in _decoders(model):
        install(part, ForwardHook(cfg, previous))


def disable(model: PreTrainedModel) -> None:
    """Decode as before: restore the attention implementation, take all hooks away.

    A model that was loaded with ``attn_implementation="delta"`` gets the implementation that
    Transformers takes by default. Does nothing when DELTA is not enabled.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    """
    hook = find_hook(model)
    if hook is None:
        return
    config = model.config.get_text_config(decoder=True)
    for part in _decoders(model):
        uninstall(part)
    _set_implementation(model, config, hook.previous or model.get_correct_attn_implementation(None))
    drop_state(config)


def stats(model: PreTrainedModel) -> DecodeStats:
    """What decoding has read since the model was enabled, over all calls of ``generate``.

    Parameters
    ----------
    model : PreTrainedModel
        A model that is enabled, or was loaded with ``attn_implementation="delta"``.

    Returns
    -------
    DecodeStats
        Live counts; :meth:`DecodeStats.reset` sets them to zero.

    Raises
    ------
    ValueError
        When DELTA is not enabled on the model.
    """
    state = active_state(model) if isinstance(model, PreTrainedModel) else None
    if state is None:
        raise ValueError(
            f"DELTA is not enabled on this {type(model).__name__}; call deltadecode.enable(model)"
        )
    return state.stats


class ForwardHook:
    """Runs before each forward pass of a model: checks its arguments and gives it a cache.

    It does nothing while the model's attention implementation is another one. Copies and pickles
    of a model take it along, with its configuration.

    Parameters
    ----------
    cfg : DeltaConfig or None
        None takes :meth:`DeltaConfig.for_model`.
    previous : str or None
        Attention implementation that :func:`disable` restores; None: the one that Transformers
        takes when none is asked for.
    """

    def __init__(self, cfg: DeltaConfig | None = None, previous: str | None = None) -> None:
        self.cfg = cfg
        self.previous = previous
        # Names of the positional arguments; looked up once, since compilers trace the calls.
        self.names: tuple[str, ...] = ()

    def __call__(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Check a call of ``model.forward`` and complete its arguments.

        Parameters
        ----------
        model : PreTrainedModel
            The model that is called.
        args, kwargs
            Its arguments.

        Returns
        -------
        tuple or None
            Arguments to call it with instead; None: unchanged.
        """
        state = active_state(model)
        if state is None:
            return None
        if args:
            kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cache = kwargs.get("past_key_values")
        check_cache(cache, state)
        static = cache if isinstance(cache, DeltaStaticCache) else None
        state.static.active = static is not None
        wanted = kwargs.get("output_attentions")
        check_attentions(model.config.output_attentions if wanted is None else wanted)
        tokens = kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        # The length of a static cache is on its device, where a compiled graph leaves it.
        readable = static is None or not torch.compiler.is_compiling()
        if isinstance(tokens, Tensor) and readable and (static is not None or tokens.shape[1] > 1):
            past = 0 if cache is None else int(cache.get_seq_length())
            total, mask = past + tokens.shape[1], kwargs.get("attention_mask")
            if tokens.shape[1] > 1:
                check_prompt(total, mask, state)
            if static is not None:
                check_rows(static, mask, total)
        if cache is None:
            wanted = kwargs.get("use_cache")
            if getattr(model.config, "use_cache", False) if wanted is None else wanted:
                kwargs = {**kwargs, "past_key_values": DeltaCache(model.config)}
        return (), kwargs


def install(model: PreTrainedModel, hook: ForwardHook) -> None:
    """Put the hook and the methods on one model, in the place of older ones.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder; its modules need not exist yet.
    hook : ForwardHook
        The hook.
    """
    uninstall(model)
    hook.names = tuple(inspect.signature(type(model).forward).parameters)[1:]
    model.register_forward_pre_hook(hook, with_kwargs=True)
    if model.can_generate():
        for override in OVERRIDES:
            vars(model)[override.method] = override(model, active_state)


def uninstall(model: PreTrainedModel) -> None:
    """Take the hook and the methods away from one model.

    Parameters
    ----------
    model : PreTrainedModel
        A model, installed or not.
    """
    hooks = model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, ForwardHook)]:
        del hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    for override in OVERRIDES:
        if isinstance(vars(model).get(override.method), Override):
            del vars(model)[override.method]


def find_hook(model: nn.Module) -> ForwardHook | None:
    """The hook on a model, if there is one.

    Parameters
    ----------
    model : nn.Module
        Any module.

    Returns
    -------
    ForwardHook or None
    """
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, ForwardHook):
            return hook
    return None


def takes_cache(model: nn.Module) -> bool:
    """Whether a module is a model that decodes from a cache.

    Parameters
    ----------
    model : nn.Module
        Any module.

    Returns
    -------
    bool
    """
    return (
        isinstance(model, PreTrainedModel)
        and "past_key_values" in inspect.signature(type(model).forward).parameters
    )


def active_state(model: PreTrainedModel) -> ModelState | None:
    """State of a model that decodes with DELTA; made at its first use.

    Parameters
    ----------
    model : PreTrainedModel
        The model.

    Returns
    -------
    ModelState or None
        None while the model's attention implementation is another one.

    Raises
    ------
    UnsupportedModelError, DeltaConfigError
        At the first use of a model that cannot be planned.
    """
    config = model.config
    if config._attn_implementation != NAME:
        config = config.get_text_config(decoder=True)
        if config._attn_implementation != NAME:
            return None
    state = find_state(config)
    if state is None:
        check_model(model)
        config = text_config(model)
        hook = find_hook(model)
        state = find_state(config) or set_state(config, hook.cfg if hook else None)
    return state


def _decoders(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [part for part in model.modules() if takes_cache(part)]  # type: ignore[misc]


def _set_implementation(model: PreTrainedModel, config: Any, name: str) -> None:
    """Set the attention implementation of the text decoder, and of nothing else if it is a part."""
    if config is model.config or model.config._attn_implementation == NAME:
        model.set_attn_implementation(name)
        return
    for key in model.config.sub_configs:
        if getattr(model.config, key, None) is config:
            model.set_attn_implementation({key: name})
