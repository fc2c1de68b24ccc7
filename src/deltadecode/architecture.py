"""What a model configuration says about its attention, read by attribute names alone.

Works on any object with the attribute names of a Hugging Face configuration; nothing is imported.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from deltadecode.errors import UnsupportedModelError

# "attention" is the name that older hybrid configurations use for the same thing.
_FULL_ATTENTION = frozenset({"full_attention", "attention"})


def text_config(model_or_config: Any) -> Any:
    """Find the configuration of the text decoder inside a model or configuration.

    Parameters
    ----------
    model_or_config
        A model (anything with a ``config``), or a configuration. Composite (vision and text)
        configurations give their text part.

    Returns
    -------
    Any
        The configuration that describes the decoder's layers.

    Raises
    ------
    UnsupportedModelError
        For an encoder-decoder, or an object that is no model configuration.
    """
    config = getattr(model_or_config, "config", model_or_config)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{_name(config)} is an encoder-decoder; DELTA plans decoder-only models"
        )
    find = getattr(config, "get_text_config", None)
    text = find(decoder=True) if callable(find) else config
    if getattr(text, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{_name(text)} is an encoder-decoder; DELTA plans decoder-only models"
        )
    layers = num_layers(text)
    if type(layers) is not int or layers < 1:
        raise UnsupportedModelError(
            f"{_name(text)} is no model configuration: num_hidden_layers is {layers!r}"
        )
    return text


def num_layers(text: Any) -> Any:
    """Layers of a text decoder's configuration; of an encoder-decoder's, those of its decoder."""
    layers = getattr(text, "decoder_layers", None)
    return getattr(text, "num_hidden_layers", None) if type(layers) is not int else layers


def longest_prompt(text: Any) -> int | None:
    """Positions of a text decoder, with what a stretched rotary embedding adds.

    None when the configuration does not say.
    """
    positions: int | None = getattr(text, "max_position_embeddings", None)
    if positions is None:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    longest = positions
    for entry in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        factor = entry.get("factor") or 1.0
        # Some configurations state the stretched number, some the original one: allow the larger.
        original = entry.get("original_max_position_embeddings") or positions
        longest = max(longest, int(factor * original))
    return longest


def own_attention(model_or_config: Any) -> str | None:
    """How a model attends that DELTA cannot plan, as its configuration says it; None: it does not.

    Such a model runs as it is, without DELTA.
    """
    config = getattr(model_or_config, "config", model_or_config)
    how: str | None = getattr(config, "own_attention", None)
    return how


def attention_layers(model_or_config: Any) -> tuple[int, ...]:
    """Numbers of the full-attention layers (docs/semantics.md, R8).

    ``layer_types`` decides where the configuration has it. Otherwise all layers are alike, and
    they are full attention unless ``sliding_window`` is smaller than ``max_position_embeddings``
    (a window as long as the longest sequence hides nothing).

    Parameters
    ----------
    model_or_config
        A model or its configuration.

    Returns
    -------
    tuple of int
        Ascending layer numbers, counted as the model counts them.

    Raises
    ------
    UnsupportedModelError
        Naming the configuration's class: attention of its own, multi-head latent attention, an
        encoder-decoder, or no full-attention layer at all.
    """
    config = text_config(model_or_config)
    how = own_attention(config)
    if how is not None:
        raise UnsupportedModelError(
            f"{_name(config)} {how}; its own generate, 'deltadecode generate' and vLLM run it as "
            "it is, without DELTA"
        )
    if getattr(config, "kv_lora_rank", None) is not None:
        raise UnsupportedModelError(
            f"{_name(config)} uses multi-head latent attention (kv_lora_rank "
            f"{config.kv_lora_rank}); DELTA needs a cache of keys and values per head"
        )
    types = getattr(config, "layer_types", None)
    if types is not None:
        full = tuple(i for i, kind in enumerate(types) if kind in _FULL_ATTENTION)
    elif getattr(config, "num_attention_heads", None) is None or _slides(config):
        full = ()
    else:
        full = tuple(range(num_layers(config)))
    crossing = getattr(config, "cross_attention_layers", None) or ()
    full = tuple(layer for layer in full if layer not in crossing)
    if not full:
        raise UnsupportedModelError(
            f"{_name(config)} has no full-attention layer; DELTA plans full-attention layers only"
        )
    return full


def kv_heads(config: Any) -> int | None:
    """KV heads of a full-attention layer; None where a configuration says nothing of them."""
    heads: int | None = getattr(_full_layer(config), "num_key_value_heads", None)
    return heads


def token_heads(config: Any) -> tuple[int, int] | None:
    """KV heads of a full-attention layer, and their size; None where nothing says it."""
    config = _full_layer(config)
    heads = getattr(config, "num_attention_heads", None)
    own, dim = kv_heads(config) or heads, getattr(config, "head_dim", None)
    if dim is None and heads and getattr(config, "hidden_size", None):
        dim = config.hidden_size // heads
    return None if not own or not dim else (own, dim)


def signature(model_or_config: Any) -> dict[str, object]:
    """Read the facts by which a calibrated profile recognises a model.

    Parameters
    ----------
    model_or_config
        A model or its configuration.

    Returns
    -------
    dict
        ``model_type``, ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads`` and
        ``num_key_value_heads`` (as many as query heads where the configuration has none).

    Raises
    ------
    UnsupportedModelError
        As :func:`text_config`.
    """
    config = text_config(model_or_config)
    heads = getattr(config, "num_attention_heads", None)
    own = kv_heads(config)
    return {
        "model_type": getattr(config, "model_type", None),
        "hidden_size": getattr(config, "hidden_size", None),
        "num_hidden_layers": num_layers(config),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if own is None else own,
    }


def config_hash(model_or_config: Any) -> str:
    """Hash of what decides a model's shape, by which a calibrated plan knows its model.

    Weights play no part, and neither does anything that a version of a library may add to a
    configuration: models of one shape have one hash.

    Parameters
    ----------
    model_or_config
        A model or its configuration.

    Returns
    -------
    str
        16 hexadecimal digits.

    Raises
    ------
    UnsupportedModelError
        As :func:`attention_layers`.
    """
    config = text_config(model_or_config)
    facts = {
        **signature(model_or_config),
        "attention_layers": attention_layers(model_or_config),
        "intermediate_size": getattr(config, "intermediate_size", None),
        "vocab_size": getattr(config, "vocab_size", None),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _full_layer(config: Any) -> Any:
    """The configuration of a full-attention layer.

    Gemma 4 gives each layer numbers of its own, and raises where one is asked for all.
    """
    per_layer = getattr(config, "per_layer_config", None)
    return config if per_layer is None else per_layer[attention_layers(config)[0]]


def _slides(config: Any) -> bool:
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return False
    longest = getattr(config, "max_position_embeddings", None)
    return longest is None or window < longest


def _name(config: Any) -> str:
    return type(config).__name__
