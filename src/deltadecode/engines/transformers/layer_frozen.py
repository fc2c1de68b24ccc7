"""What must not change in a model while its layers are replayed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

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
    layers : sequence of nn.Module
        The layers that are recorded.

    Attributes
    ----------
    device : torch.device or None
        Of all layers; None where they cannot be recorded.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        inside = [part for layer in layers for part in layer.modules()]
        outer = set(layers)
        # Else the model would be freed by the garbage collector alone.
        self._inside = [weakref.ref(part) for part in inside if part not in outer]
        self._children = [(weakref.ref(part), _children(part)) for part in inside if part._modules]
        self._weights = [
            (weakref.ref(part), _addresses(part))
            for part in inside
            if part._parameters or part._buffers
        ]
        self.device = _device(inside)

    def changed(self) -> bool:
        """Whether modules or weights are others than before, or lie elsewhere."""
        for known, children in self._children:
            part = known()
            if part is None or _children(part) != children:
                return True
        for known, addresses in self._weights:
            part = known()
            if part is None or _addresses(part) != addresses:
                return True
        return False

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


def _addresses(part: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in _held(part)]


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
