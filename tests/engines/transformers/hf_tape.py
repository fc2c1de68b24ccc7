"""What a CUDA graph does, on a CPU: the same operations on the same memory, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deltadecode.engines.transformers import lossless_static, passes
from deltadecode.ops import DecodeInputs

_WAIT = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item")


class Tape(TorchDispatchMode):
    """Runs operations and keeps them; refuses those for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in _WAIT:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, tree_leaves(out)))
        return out


class TapedGraph:
    """In the place of :class:`deltadecode.ops.graphs.Graph`."""

    def __init__(
        self, run: Callable[[], Tensor], restore: Callable[[], object], pool: Any, checks: bool
    ) -> None:
        run()
        restore()
        try:
            with Tape() as tape:
                self.result = run()
        finally:  # a graph that is captured does nothing yet
            restore()
        self.calls, self.replays = tape.calls, 0

    def replay(self) -> Tensor:
        self.replays += 1
        for func, args, kwargs, results in self.calls:
            for old, new in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
                # What writes in place, and views, give the memory that they got.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self.result


def _operator(inputs: DecodeInputs) -> tuple[Tensor, Tensor | None]:
    """``decode_rows`` as the one operation that it is in a graph."""
    values = [getattr(inputs, field.name) for field in fields(DecodeInputs)]
    out, scores = torch.ops.deltadecode.decode_rows(*values, "auto")
    return out, scores if inputs.return_page_scores else None


@contextmanager
def taped_graphs() -> Iterator[list[TapedGraph]]:
    """Capture passes on the CPU; gives the graphs."""
    made: list[TapedGraph] = []

    def capture(*args: Any) -> TapedGraph:
        made.append(TapedGraph(*args))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "Graph", capture)
        patch.setattr(passes, "graph_pool", lambda: None)
        patch.setattr("deltadecode.engines.transformers.speculation.on_gpu", lambda cache: True)
        patch.setattr(lossless_static, "decode_rows", _operator)
        # A capture is known from the stream, which a CPU has not.
        patch.setattr("transformers.masking_utils.is_tracing", lambda tensor=None: True)
        yield made
