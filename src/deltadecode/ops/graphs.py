"""CUDA graphs of passes that read and write memory which stays where it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Graph:
    """A captured pass, whose result the next run overwrites.

    Parameters
    ----------
    run : callable
        The pass. All that it reads and writes must stay in its place while the graph is used.
    restore : callable
        Takes back what a pass, whole or not, has left in such memory; called behind each of two
        runs outside of the graph, in which kernels compile.
    pool
        Memory shared with other graphs, of :func:`torch.cuda.graph_pool_handle`: then only one of
        their results is whole at a time.
    checks : bool
        Find out before whether the pass waits for the GPU: a capture that fails leaves PyTorch's
        random numbers unusable.

    Raises
    ------
    RuntimeError
        When it does.
    """

    def __init__(
        self,
        run: Callable[[], Tensor],
        restore: Callable[[], object],
        pool: Any = None,
        checks: bool = False,
    ) -> None:
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                for watched in (nullcontext(), _no_waiting() if checks else nullcontext()):
                    try:
                        with watched:
                            run()
                    finally:
                        restore()
        finally:
            current.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._result = run()
        finally:  # a capture that fails leaves its own stream behind
            torch.cuda.set_stream(current)

    def replay(self) -> Tensor:
        """Run it."""
        self._graph.replay()
        return self._result


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Let operations for which the host waits for the GPU raise a RuntimeError."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not find all of them
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
