"""CUDA graphs of passes that read and write memory which stays where it is."""

from __future__ import annotations

from collections.abc import Callable
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
        Takes back what a pass has left in such memory; called behind each of two runs outside of
        the graph, in which kernels compile.
    pool
        Memory shared with other graphs, of :func:`torch.cuda.graph_pool_handle`: then only one of
        their results is whole at a time.
    """

    def __init__(
        self, run: Callable[[], Tensor], restore: Callable[[], object], pool: Any = None
    ) -> None:
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
                restore()
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
