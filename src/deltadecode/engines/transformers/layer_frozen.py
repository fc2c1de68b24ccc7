"""What must not change in a model while its layers are replayed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_torch

from deltadecode.engines.transformers import layer_pieces

# Its hooks stand on every model, and do nothing unless outputs are asked for.
_COLLECTING = "transformers.utils.output_capturing"


class Frozen:
    """What recordings hold of a model, looked at before each step.

    Parameters
    ----------
    model : nn.Module
        The decoder.
    layers : sequence of nn.Module
        Its layers that are recorded.

    Attributes
    ----------
    device : torch.device or None
        Of all layers; None where they cannot be recorded.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        inside = [part for layer in layers for part in layer.modules()]
        outer = set(layers)
        # Else the model would be freed by the garbage collector alone.
        self._inside = [weakref.ref(part) for part in inside if part not in outer]
        around = [part for part in model.modules() if outer.intersection(part._modules.values())]
        held = [part for part in (*around, *inside) if part._modules]
        self._children = [(weakref.ref(part), _children(part)) for part in held]
        # Parameters and buffers by name, which hold no module: modules would hold the model.
        named = [held for part in inside for held in (part._parameters, part._buffers) if held]
        self._weights = [(held, _addresses(held)) for held in named]
        self.device = _device(inside)

    def changed(self) -> bool:
        """Whether modules or weights are others than before, or lie elsewhere."""
        for known, children in self._children:
            part = known()
            if part is None or _children(part) != children:
                return True
        return any(_addresses(held) != addresses for held, addresses in self._weights)

    def hooked(self) -> bool:
        """Whether hooks look into a layer, or a part of it is in training."""
        if of_torch._global_forward_hooks or of_torch._global_forward_pre_hooks:
            return True
        for known in self._inside:
            part = known()
            if part is None or part.training or part._forward_pre_hooks:
                return True
            if part._forward_hooks and any(
                hook.__module__ != _COLLECTING for hook in part._forward_hooks.values()
            ):
                return True
        return False


def _children(part: nn.Module) -> list[int]:
    return [id(child) for child in part._modules.values()]


def _addresses(held: dict[str, Any]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in held.values()]


def _held(part: nn.Module) -> list[Tensor]:
    held = (*part._parameters.values(), *part._buffers.values())
    return [tensor for tensor in held if tensor is not None]


def _device(inside: Sequence[nn.Module]) -> torch.device | None:
    """The one device of layers, if they can be recorded."""
    # Adapters can be switched between two steps, and hooks of accelerate move what they get.
    if any(hasattr(part, "base_layer") or hasattr(part, "_hf_hook") for part in inside):
        return None
    held = [tensor for part in inside for tensor in _held(part)]
    devices = {tensor.device for tensor in held}
    # Weights of other types may be made anew at each use.
    if len(devices) != 1 or not {type(tensor) for tensor in held} <= {nn.Parameter, Tensor}:
        return None
    device = devices.pop()
    return device if layer_pieces.Pieces.takes(device) else None
