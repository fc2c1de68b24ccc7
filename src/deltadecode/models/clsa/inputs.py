"""What a forward pass is given, checked before anything runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deltadecode.errors import ArgumentError
from deltadecode.models.clsa.configuration import ClsaConfig


def refuse_weights(options: dict[str, Any]) -> None:
    """Refuse to return attention weights (ArgumentError)."""
    if options.get("output_attentions"):
        raise ArgumentError("a CLSA model gives no attention weights, got output_attentions=True")


def check_length(config: ClsaConfig, tokens: int) -> None:
    """Refuse a context past the model's positions (ArgumentError)."""
    if tokens > config.max_position_embeddings:
        raise ArgumentError(
            f"a context must not exceed the model's {config.max_position_embeddings} "
            f"positions, got {tokens} tokens"
        )


def valid_tokens(mask: Tensor | None, rows: int, tokens: int) -> Tensor | None:
    """Which tokens are no padding, bool [B, T]; None where all are none.

    ArgumentError for a mask of another shape.
    """
    if mask is None:
        return None
    if mask.shape != (rows, tokens):
        raise ArgumentError(
            f"attention_mask must be [{rows}, {tokens}], a row's tokens so far, "
            f"got {list(mask.shape)}"
        )
    valid = mask.bool()
    return None if bool(valid.all()) else valid
