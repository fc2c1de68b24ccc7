"""What a layer asks of the attention interface, checked before anything runs.

An attention function sees tensors and keyword arguments only. Whether DELTA's may stand in for the
stock ones follows from how the layer calls it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from deltadecode.architecture import text_config
from deltadecode.engines.transformers.layer_source import InterfaceUse, interface_use, own_cache
from deltadecode.errors import UnsupportedModelError

# Arguments that DELTA computes with, and those that change no number of a planned layer.
_KNOWN = frozenset(
    [
        *("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal"),
        *("softcap", "s_aux", "sliding_window", "output_attentions", "use_cache", "cache"),
        *("cache_position", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q"),
        *("max_length_k", "deterministic"),
    ]
)


def attention_modules(model: PreTrainedModel) -> dict[int, list[tuple[str, nn.Module]]]:
    """Causal self-attention of the text decoder by layer number, with the names of the modules.

    A module counts when it has a ``layer_idx`` and its class calls the interface. Where the source
    cannot be read, ``is_causal`` decides; what such a layer passes to its attention function shows
    at its first call.
    """
    attending = [
        (name, module)
        for name, module in model.named_modules()
        if type(getattr(module, "layer_idx", None)) is int and _attends(module)
    ]
    config = text_config(model)
    of_module = [getattr(module, "config", None) for _, module in attending]
    # By identity first: two decoders of one model may have equal configurations. The modules of a
    # model whose `config` was replaced hold the old one.
    mine = [place for place, other in enumerate(of_module) if other is config]
    mine = mine or [place for place, other in enumerate(of_module) if type(other) is type(config)]
    layers: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in [attending[place] for place in mine] or attending:
        layers.setdefault(int(module.layer_idx), []).append((name, module))
    return layers


def check_interface(model: PreTrainedModel, layers: Collection[int]) -> dict[int, nn.Module]:
    """Attention module of each of ``layers``, which are those to be planned.

    Raises
    ------
    UnsupportedModelError
        Where DELTA's attention function would not compute what a layer asks for, naming the
        model's class, the module and the reason.
    """
    modules = attention_modules(model)
    kinds: set[Any] = {type(part) for part in model.modules()}
    reasons = [
        f"{kind.__name__} decodes from a {cache} only"
        for kind in kinds
        if (cache := own_cache(kind)) is not None
    ]
    for layer, named in modules.items():
        for path, module in named:
            reason = _reason(module, planned=layer in layers)
            if reason is not None:
                reasons.append(f"{path} ({type(module).__name__}) {reason}")
    for layer in layers:
        count = len(modules.get(layer, ()))
        if count != 1:
            reasons.append(
                f"layer {layer} has {count or 'no'} causal self-attention on the attention "
                "interface of Transformers, and must have one"
            )
    if reasons:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot decode with DELTA: {reasons[0]}"
        )
    return {layer: modules[layer][0][1] for layer in layers}


def _use(module: nn.Module) -> InterfaceUse | None:
    kind: Any = type(module)
    parts = {**vars(module), **module._modules}
    return interface_use(kind, frozenset(name for name, part in parts.items() if part is None))


def _attends(module: nn.Module) -> bool:
    use, causal = _use(module), getattr(module, "is_causal", None)
    if use is None:
        return bool(causal)
    if not use.calls or use.never_causal or getattr(module, "is_cross_attention", False):
        return False
    return use.crosses is None if causal is None else bool(causal)


def _reason(module: nn.Module, *, planned: bool) -> str | None:
    """Why DELTA cannot compute this layer, or None; layers outside the plan go to ``sdpa``."""
    use = _use(module)
    if use is not None:
        unknown = use.keywords - _KNOWN - (frozenset() if planned else {"position_bias"})
        if unknown:
            return f"passes {min(unknown)} to its attention function, which DELTA does not know"
        if use.own_mask and (planned or use.asks_name):
            return "selects or weighs tokens by a mask of its own"
        if planned and use.calls > 1:
            return "calls its attention function more than once a step"
    if planned and getattr(module, "kv_lora_rank", None) is not None:
        return f"is multi-head latent attention (kv_lora_rank {module.kv_lora_rank})"
    values: Any = getattr(module, "v_head_dim", None)
    keys: Any = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None)
    if planned and isinstance(values, int) and isinstance(keys, int) and values != keys:
        return f"has keys of size {keys} and values of size {values}; DELTA needs one head size"
    return None
