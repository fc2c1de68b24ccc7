"""Which modules of a model decode with DELTA: found once, checked, and given their role.

Everything that DELTA knows of a model hangs on its attention modules and on the hook of its
decoder. So it goes with the model when that is copied, pickled, replicated or dropped.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from torch import nn
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import PreTrainedModel

from deltadecode.architecture import attention_layers
from deltadecode.config import DeltaConfig
from deltadecode.engines.transformers.hook import ForwardHook
from deltadecode.engines.transformers.interface import attention_modules, check_interface
from deltadecode.engines.transformers.layer_graphs import unwrap_layers, wrap_layers
from deltadecode.engines.transformers.state import NAME, ROLE, ModelState, Role
from deltadecode.errors import ArgumentTypeError, UnsupportedModelError

# States that hang on a model. Several may attend by one configuration object.
_attached: WeakSet[ModelState] = WeakSet()


def unwrap(model: Any, *, decodes: bool = True) -> PreTrainedModel:
    """The Transformers model inside wrappers: PEFT, ``torch.compile``, data parallelism.

    ``decodes`` says whether it must be able to decode with DELTA in them.

    Raises
    ------
    ArgumentTypeError
        When there is none.
    UnsupportedModelError
        For PEFT prefix tuning, which decodes from a cache of its own, where it must decode.
    """
    part = model
    while not isinstance(part, PreTrainedModel):
        adapters = getattr(part, "peft_config", None)
        adapters = adapters if isinstance(adapters, dict) else {}
        for adapter in adapters.values():
            if decodes and str(getattr(adapter, "peft_type", "")).endswith("PREFIX_TUNING"):
                raise UnsupportedModelError(
                    f"{type(part).__name__} cannot decode with DELTA: PEFT prefix tuning passes a "
                    "cache of its own to the model"
                )
        inner = getattr(part, "_orig_mod", None)
        if inner is None and callable(getattr(part, "get_base_model", None)):
            inner = part.get_base_model()
        if inner is None:
            # Of PEFT, a model of mixed adapters alone has no method for it.
            inner = part.base_model.model if adapters else getattr(part, "module", None)
        if not isinstance(inner, nn.Module):
            raise ArgumentTypeError(f"model must be a PreTrainedModel, got {type(model).__name__}")
        part = inner
    return part


def takes_cache(model: nn.Module) -> bool:
    """Whether a module is a model that decodes from a cache."""
    return (
        isinstance(model, PreTrainedModel)
        and "past_key_values" in inspect.signature(type(model).forward).parameters
    )


@dataclass(frozen=True)
class Decoder:
    """The part of a model that holds its planned layers.

    Attributes
    ----------
    model : PreTrainedModel
        The innermost model around the layers.
    planned : dict
        Layer -> its causal self-attention.
    others : list of nn.Module
        Its attention modules that are not planned.
    """

    model: PreTrainedModel
    planned: dict[int, nn.Module]
    others: list[nn.Module]

    @property
    def configs(self) -> list[Any]:
        """The configuration objects, each once, that say how this part attends."""
        modules = (self.model, *self.planned.values(), *self.others)
        return list({id(module.config): module.config for module in modules}.values())


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Find the planned modules of a model, through nested configurations.

    Raises
    ------
    UnsupportedModelError
        Naming the model's class and what cannot be planned.
    """
    name = type(model).__name__

    def refusal(reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{name} cannot decode with DELTA: {reason}")

    try:
        layers = attention_layers(model)
    except UnsupportedModelError as error:
        raise refusal(str(error)) from None
    if not model._can_set_attn_implementation():
        raise refusal("it does not use the attention interface of Transformers")
    # Of the class it needs nothing but the name, which models without ``generate`` have, too.
    mixin: Any = GenerationMixin
    if not mixin._supports_default_dynamic_cache.__func__(type(model)):
        raise refusal("it decodes from a cache class of its own")
    if not attention_modules(model):
        raise refusal("none of its attention layers is causal")
    planned = check_interface(model, layers)
    planned_ids = {id(module) for module in planned.values()}
    for part in filter(takes_cache, model.modules()):
        own = list(_attention_modules(part))
        others = [module for module in own if id(module) not in planned_ids]
        if len(own) - len(others) == len(planned):
            return Decoder(part, planned, others)  # type: ignore[arg-type]
    raise refusal("its planned layers are not those of one decoder with a cache")


def _attention_modules(part: nn.Module) -> Iterator[nn.Module]:
    """Modules with a layer number that belong to a model and to no model inside it."""
    for child in part.children():
        if takes_cache(child):
            continue
        if type(getattr(child, "layer_idx", None)) is int and hasattr(child, "config"):
            yield child
        yield from _attention_modules(child)


def find_hooks(model: nn.Module) -> Iterator[tuple[PreTrainedModel, int, ForwardHook]]:
    """The hooks of a model and of all its parts: part, key, hook."""
    part: Any
    for part in model.modules():
        for key, hook in part._forward_pre_hooks.items():
            if isinstance(hook, ForwardHook):
                yield part, key, hook


def find_hook(model: nn.Module) -> ForwardHook | None:
    """The hook that decides for a model: one with a state before one that awaits its first use."""
    hooks = [hook for _, _, hook in find_hooks(model)]
    return next((hook for hook in hooks if hook.state is not None), hooks[0] if hooks else None)


def find_state(model: nn.Module) -> ModelState | None:
    """State of a model that decodes with DELTA now; a model loaded by name is bound here.

    Raises
    ------
    UnsupportedModelError, DeltaConfigError
        At the first use of a model that cannot be planned.
    """
    hook = find_hook(model)
    if hook is not None and hook.state is not None:
        return hook.state if hook.state.active else None
    for part, _, _ in find_hooks(model) if hook is not None else ():
        if NAME in (
            part.config._attn_implementation,
            part.config.get_text_config(decoder=True)._attn_implementation,
        ):
            return bind(model, None)  # type: ignore[arg-type]
    return None


def bind(
    model: PreTrainedModel,
    cfg: DeltaConfig | None,
    draft_tokens: int = 0,
    draft_fixed: bool = True,
    kv_dtype: str | None = None,
    layer_graphs: bool = False,
) -> ModelState:
    """Give the modules of a model their roles, in place of older ones, and its decoder the hook.

    Raises
    ------
    UnsupportedModelError, DeltaConfigError
        Before anything has changed.
    """
    decoder = find_decoder(model)
    config: Any = next(iter(decoder.planned.values())).config
    previous = config._attn_implementation
    if previous == NAME:
        hook = find_hook(model)
        older = hook.state if hook is not None else None
        older = older or next((state for state in _attached if state.config is config), None)
        previous = None if older is None else older.previous
    state = ModelState(config, cfg, previous, draft_tokens, draft_fixed, kv_dtype, layer_graphs)
    attach(model, decoder, state)
    for used in decoder.configs:
        used._attn_implementation_internal = NAME
    return state


def set_implementation(model: PreTrainedModel, name: str | None) -> None:
    """Put an attention implementation wherever ``"delta"`` is; None: each part's default."""
    for part in model.modules():
        config: Any = getattr(part, "config", None)
        if getattr(config, "_attn_implementation", None) == NAME:
            owner = part if isinstance(part, PreTrainedModel) else model
            wanted = name or owner.get_correct_attn_implementation(None)
            config._attn_implementation_internal = wanted


def attach(model: PreTrainedModel, decoder: Decoder, state: ModelState) -> None:
    """Hang a state on a model's modules."""
    detach(model)
    for layer, module in decoder.planned.items():
        plan = state.plan
        vars(module)[ROLE] = Role(state, layer, plan.roles[layer], plan.sources[layer])
    for module in decoder.others:
        vars(module)[ROLE] = Role(state, module.layer_idx, "own", None)  # type: ignore[arg-type]
    if state.graphs is not None:
        found = attention_modules(model).values()
        attentions = [module for modules in found for _, module in modules]
        wrap_layers(decoder.model, state, [each for each in attentions if ROLE in vars(each)])
    ForwardHook(state).install(decoder.model)
    _attached.add(state)


def detach(model: PreTrainedModel) -> None:
    """Take all hooks and roles away from a model."""
    for part, key, hook in list(find_hooks(model)):
        if hook.state is not None:
            _attached.discard(hook.state)
        del part._forward_pre_hooks[key]
        part._forward_pre_hooks_with_kwargs.pop(key, None)
    unwrap_layers(model)
    for module in model.modules():
        vars(module).pop(ROLE, None)


def is_shared(state: ModelState | None) -> bool:
    """Whether another model decodes with DELTA by the same configuration object."""
    return state is not None and any(
        other.config is state.config for other in _attached if other is not state
    )


def await_first_use(model: PreTrainedModel) -> None:
    """Put a hook on a model that was just set to ``"delta"`` by name, if it has none."""
    if takes_cache(model) and next(find_hooks(model), None) is None:
        ForwardHook(first_use=find_state).install(model)
