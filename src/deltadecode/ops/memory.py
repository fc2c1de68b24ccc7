"""Memory as kernels get it: addresses, and what the layers of one step write over in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class HasAddress(Protocol):
    """A tensor, or what stands for one in a launch."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of an element."""

    def data_ptr(self) -> int:
        """Address of the first element."""


@dataclass(slots=True)
class Pointer:
    """An address in a tensor, for less than a view of it costs.

    No tuple: Triton takes those apart.
    """

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        """Address of the first element, as of a tensor."""
        return self.address


class Scratch:
    """Memory that the layers of one forward pass use in turn, all of them on one stream."""

    def __init__(self) -> None:
        self._held: Tensor | None = None
        self._captured = False

    def floats(self, count: int, like: Tensor) -> Tensor:
        """At least ``count`` float32 numbers beside a tensor; they hold anything.

        What a CUDA graph uses is allocated while it is captured, and so belongs to the graph.
        """
        captured = is_captured(like)
        held = self._held
        if (
            held is None
            or held.shape[0] < count
            or captured != self._captured
            or held.device != like.device
        ):
            held = torch.empty(count, dtype=torch.float32, device=like.device)
            self._held, self._captured = held, captured
        return held


def is_captured(tensor: Tensor) -> bool:
    """Whether what is done with a tensor goes into a CUDA graph, and not to the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
