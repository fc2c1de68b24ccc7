"""Pieces of layer graphs on the CPU: what is recorded runs for its shapes alone, until a replay.

As in a CUDA graph, what was recorded holds nothing before the first replay, and a replay runs the
same operations on the same memory, whatever Python does meanwhile.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deltadecode.engines.transformers import layer_pieces


class SimulatedPiece(TorchDispatchMode):
    """Operations, and the tensors that they give."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.fresh: list[Tensor] = []
        self.replays = 0
        self.recorded = False

    def begin(self) -> None:
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)
        self.recorded = True
        for tensor in self.fresh:
            _poison(tensor)
        self.fresh.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        held = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            if tensor.untyped_storage().data_ptr() not in held:
                self.fresh.append(tensor)
                if tensor.is_floating_point():  # others may be numbers of places
                    _poison(tensor)
        return out

    def replay(self) -> None:
        assert self.recorded
        self.replays += 1
        # As a graph does, in no mode of Python's: tensors of inference are written to.
        with torch.inference_mode():
            for func, args, kwargs, out in self.operations:
                again = func(*args, **kwargs)
                for tensor, fresh in zip(_tensors(out), _tensors(again), strict=True):
                    if tensor.untyped_storage().data_ptr() != fresh.untyped_storage().data_ptr():
                        tensor.copy_(fresh)


class SimulatedPieces:
    """In the place of those of CUDA; ``made`` has all pieces that tests may look at."""

    made: ClassVar[list[SimulatedPiece]] = []

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @staticmethod
    def takes(device: torch.device) -> bool:
        return device.type in ("cpu", "meta")

    def ready(self) -> bool:
        return True

    def make(self) -> SimulatedPiece:
        piece = SimulatedPiece()
        SimulatedPieces.made.append(piece)
        return piece


def simulate(monkeypatch: Any) -> list[SimulatedPiece]:
    """Put them in their place; gives the pieces that are made from now on."""
    SimulatedPieces.made = []
    monkeypatch.setattr(layer_pieces, "Pieces", SimulatedPieces)
    return SimulatedPieces.made


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _poison(tensor: Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    elif tensor.dtype == torch.bool:
        tensor.logical_not_()
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max)
