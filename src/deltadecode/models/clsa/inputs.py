"""What a forward pass is given, checked before anything runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltadecode.errors import ArgumentError
from deltadecode.models.clsa.configuration import ClsaConfig


def refuse_weights(config: ClsaConfig, options: dict[str, Any]) -> None:
    """Refuse to return attention weights (ArgumentError)."""
    asked = options.get("output_attentions")
    if config.output_attentions if asked is None else asked:
        raise ArgumentError("a CLSA model gives no attention weights, got output_attentions=True")


def refuse_beside_static(config: ClsaConfig, labels: Any, options: dict[str, Any]) -> None:
    """Refuse what steps of fixed shapes do not give: a loss, or hidden states (ArgumentError)."""
    asked = options.get("output_hidden_states")
    given = {
        "labels": labels is not None,
        "index_loss": bool(options.get("index_loss")),
        "output_hidden_states": config.output_hidden_states if asked is None else asked,
    }
    for name, wanted in given.items():
        if wanted:
            raise ArgumentError(
                f"a ClsaStaticCache gives logits alone, got {name}; use a ClsaCache"
            )


def check_input(
    ids: Tensor | None, embeds: Tensor | None, positions: Tensor | None = None
) -> Tensor:
    """The one that is given: token ids [B, Q], or tokens embedded, [B, Q, hidden].

    ArgumentError for none or both, another shape, or positions of other tokens.
    """
    given = ids if embeds is None else embeds
    if given is None or (ids is not None and embeds is not None):
        raise ArgumentError("give input_ids or inputs_embeds, one of them")
    name, sizes = ("input_ids", 2) if embeds is None else ("inputs_embeds", 3)
    shape = list(given.shape)
    if len(shape) != sizes or 0 in shape:
        wanted = "[B, Q]" if sizes == 2 else "[B, Q, hidden]"
        raise ArgumentError(f"{name} must be {wanted}, of one token or more, got {shape}")
    if positions is not None and list(positions.shape) not in (shape[:2], [1, shape[1]]):
        raise ArgumentError(
            f"position_ids must be [{shape[0]}, {shape[1]}], one for each new token, "
            f"got {list(positions.shape)}"
        )
    return given


def check_places(positions: Tensor | None, places: Tensor | None, valid: Tensor | None) -> None:
    """Refuse positions [1 or B, Q] of a prompt that do not count its rows' own tokens, ``places``.

    From where they count plays no part. ArgumentError.
    """
    if positions is None:
        return
    if places is None:
        places = torch.arange(positions.shape[1], device=positions.device)
    shift, most = positions - places, torch.iinfo(torch.long).max
    padding = torch.zeros_like(shift, dtype=torch.bool) if valid is None else ~valid
    first, last = shift.masked_fill(padding, most), shift.masked_fill(padding, -most)
    if (first.amin(1) < last.amax(1)).any():
        raise ArgumentError(
            "a ClsaStaticCache takes position_ids that count a row's tokens one by one, without "
            "its padding; use a ClsaCache"
        )


def check_length(config: ClsaConfig, tokens: int) -> None:
    """Refuse a context past the model's positions (ArgumentError)."""
    if tokens > config.max_position_embeddings:
        raise ArgumentError(
            f"a context must not exceed the model's {config.max_position_embeddings} "
            f"positions, got {tokens} tokens"
        )


def valid_tokens(mask: Tensor | None, rows: int, tokens: int) -> Tensor | None:
    """Which tokens are no padding, bool [B, T]; None where all are none.

    ArgumentError for a mask of another shape, or for what is no tensor.
    """
    if mask is None:
        return None
    shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if shape != [rows, tokens]:
        raise ArgumentError(
            f"attention_mask must be [{rows}, {tokens}], a row's tokens so far, got {shape}"
        )
    valid = mask.bool()
    # A compiled pass cannot ask: its mask stays, whatever is in it.
    return valid if torch.compiler.is_compiling() or not bool(valid.all()) else None
