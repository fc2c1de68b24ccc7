"""Launches of kernels without what Triton does before each of them.

Triton binds and classifies every argument of every launch, which takes longer than many of these
kernels. All of it but the pointers is the same at each launch of a plan, and of a pointer only its
type counts, and whether it is a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

from deltadecode.ops.memory import HasAddress, Pointer

# What Triton compiles for, when a pointer or a number is a multiple of it.
_ALIGNED = 16


class Launch:
    """One kernel, its grid, and all of its arguments but the pointers, which come first.

    Parameters
    ----------
    kernel : triton.JITFunction
        Its compile-time parameters come last.
    grid : tuple of int
        Three numbers.
    numbers : sequence of int or float
        Arguments after the pointers.
    constants : dict
        Compile-time parameters and options, by name.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        numbers: Sequence[float],
        constants: dict[str, Any],
    ) -> None:
        self._kernel, self._grid = kernel, grid
        self._numbers, self._constants = tuple(numbers), constants
        given = [constants[name] for name in kernel.arg_names if name in constants]
        self._rest = (*self._numbers, *given)
        self._run: Any = None

    def __call__(self, *pointers: HasAddress) -> None:
        """Launch on the current stream, with pointers of the same types at every call."""
        if self._run is not None:
            addresses = [pointer.data_ptr() for pointer in pointers]
            if not _any_bits(addresses) % _ALIGNED and not _watched():
                # No metadata and no hooks: nobody watches.
                self._run(
                    *self._grid, driver.active.get_current_stream(self._device), self._function,
                    self._metadata, None, None, None, *addresses, *self._rest,
                )  # fmt: skip
                return
        compiled = self._kernel[self._grid](*pointers, *self._numbers, **self._constants)
        if self._run is None and not _any_bits(p.data_ptr() for p in pointers) % _ALIGNED:
            self._keep(compiled)

    def compile(self, *types: torch.dtype) -> None:
        """Compile and load for aligned pointers to such elements, without a launch."""
        pointers = (Pointer(0, dtype) for dtype in types)
        self._keep(
            self._kernel.warmup(*pointers, *self._numbers, grid=self._grid, **self._constants)
        )

    def _keep(self, compiled: Any) -> None:
        # The interpreter gives nothing back. A kernel loads when its ``run`` is first asked for.
        run = getattr(compiled, "run", None)
        if run is not None:
            self._device = driver.active.get_current_device()
            self._function, self._metadata = compiled.function, compiled.packed_metadata
            self._run = run


def _any_bits(addresses: Any) -> int:
    bits = 0
    for address in addresses:
        bits |= address
    return bits


def _watched() -> bool:
    """Whether a profiler wants to hear of launches; Triton keeps one hook, or a chain of them."""
    hook = knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))
