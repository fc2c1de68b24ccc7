"""What a layer does while it is recorded: operations that a replay would get wrong are refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Of these, only those with a mask make the host wait for its length.
_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


class RefusedError(Exception):
    """A layer that cannot be recorded; the message says what it does, behind its name."""


class Watch(TorchDispatchMode):
    """Sees every operation of a layer.

    Parameters
    ----------
    device : torch.device
        On which all of them must be.
    given : iterable of Tensor
        What they may read, and not write: what is in the same place at every step.

    Attributes
    ----------
    between : bool
        Between the cache and attention, where nothing is recorded.
    reason : str or None
        Why what was recorded is of no use.
    """

    def __init__(self, device: torch.device, given: Iterable[Tensor]) -> None:
        super().__init__()
        self._device = device
        self._given = {_storage(tensor) for tensor in given}
        self._made: set[StorageWeakRef] = set()
        self.between = False
        self.reason: str | None = None

    def allow(self, tensor: Tensor) -> None:
        """Let it be read from now on."""
        self._given.add(_storage(tensor))

    def made(self, value: Any) -> bool:
        """Whether a value is a tensor that was made here."""
        return isinstance(value, Tensor) and _storage(value) in self._made

    def stays(self, value: Any) -> bool:
        """Whether all tensors in a value are in the same place at every step."""
        return all(self.made(part) or _storage(part) in self._given for part in _tensors(value))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.between:
            name = func.overloadpacket.__name__
            self.reason = self.reason or f"computes {name} between its cache and its attention"
            return func(*args, **kwargs)
        self._check(func, args, kwargs)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            storage = _storage(tensor)
            if tensor.device != self._device:
                raise RefusedError(f"computes {func.overloadpacket.__name__} on another device")
            if storage not in self._given:
                self._made.add(storage)
        return out

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = func.overloadpacket.__name__
        if _waits(func, args, kwargs):
            raise RefusedError(f"waits for the GPU in {name}")
        device = kwargs.get("device")
        if device is not None and torch.device(device).type != self._device.type:
            raise RefusedError(f"computes {name} on another device")
        for tensor in _tensors((args, kwargs)):
            if not self.stays(tensor):
                raise RefusedError(f"reads in {name} what it was not given as a token's tensor")
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = args[place] if place < len(args) else kwargs.get(argument.name)
            if not all(self.made(tensor) for tensor in _tensors(written)):
                raise RefusedError(f"writes in {name} to what it was given")


def _waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the host waits for the GPU, to know a value or a length."""
    if func.overloadpacket in _INDEXING:
        return any(part.dtype in (torch.bool, torch.uint8) for part in _tensors(args[1]))
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return bool(tags.intersection(func.tags))


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _storage(tensor: Tensor) -> StorageWeakRef:
    # While it is held, no other storage gets its number.
    return StorageWeakRef(tensor.untyped_storage())
