"""What policies share that let a few layers choose for the others."""

from __future__ import annotations

from collections.abc import Sequence

from deltadecode.errors import PolicyError
from deltadecode.lab.policies.base import Floats, Layout


def places_of(
    name: str, layout: Layout, layers: Sequence[int] | None, default: Sequence[int]
) -> list[int]:
    """Places of layers among the full-attention layers, ascending, each once.

    ``layers`` are the model's own numbers; None gives ``default``, which are places already.
    Raises PolicyError for a layer of another kind, or for none.
    """
    if layers is None:
        return sorted(set(default))
    if unknown := [layer for layer in layers if layer not in layout.layers]:
        raise PolicyError(
            f"layers of policy {name!r} must be full-attention layers, got {unknown[0]}"
        )
    if not layers:
        raise PolicyError(f"policy {name!r} needs at least one selection layer")
    return sorted({layout.layers.index(layer) for layer in layers})


def full_layers_mean(layout: Layout, full: int, lengths: Floats, others: Floats) -> Floats:
    """Mean over the layers, where ``full`` of them read all tokens and the rest ``others``."""
    share = full / len(layout.layers)
    mean: Floats = share * lengths + (1 - share) * others
    return mean
