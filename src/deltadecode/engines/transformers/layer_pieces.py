"""Pieces of a layer that run as CUDA graphs; all that layer graphs need of CUDA."""

from __future__ import annotations

import gc
from typing import Any, Protocol

import torch


class Piece(Protocol):
    """Operations that are recorded once and then run without Python."""

    def begin(self) -> None:
        """Record from here on; what is recorded does not run."""

    def end(self) -> None:
        """Record no more."""

    def replay(self) -> None:
        """Run what was recorded, in the order of the current stream's work."""


class CudaPiece:
    """A CUDA graph, captured on a stream of its own.

    Parameters
    ----------
    stream : torch.cuda.Stream
        To capture on.
    pool
        Memory shared with other graphs, of :func:`torch.cuda.graph_pool_handle`.
    """

    def __init__(self, stream: torch.cuda.Stream, pool: Any) -> None:
        self._stream, self._pool = stream, pool
        self._graph = torch.cuda.CUDAGraph()

    def begin(self) -> None:
        """Begin to capture."""
        self._within: Any = torch.cuda.stream(self._stream)
        self._current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(self._current)
        self._collects = gc.isenabled()
        gc.disable()  # what is collected may wait for the GPU, which ends a capture
        self._within.__enter__()
        try:
            self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        except BaseException:
            self._leave()
            raise

    def end(self) -> None:
        """End the capture."""
        try:
            self._graph.capture_end()
        finally:
            self._leave()

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()

    def _leave(self) -> None:
        self._within.__exit__(None, None, None)
        self._current.wait_stream(self._stream)
        if self._collects:
            gc.enable()


class Pieces:
    """Makes the pieces of one model. They share memory, so they must run in one order.

    Parameters
    ----------
    device : torch.device
        Of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._current = torch.cuda.current_stream(device)
        # A pool whose graphs are all gone cannot be used again.
        self._made: list[Piece] = []

    @staticmethod
    def takes(device: torch.device) -> bool:
        """Whether there are pieces on such a device."""
        return device.type == "cuda"

    def ready(self) -> bool:
        """Whether the stream is still that of the first piece: two streams would run at once."""
        return bool(torch.cuda.current_stream(self._stream.device) == self._current)

    def make(self) -> Piece:
        """A piece in which nothing is recorded yet."""
        piece = CudaPiece(self._stream, self._pool)
        self._made.append(piece)
        return piece
