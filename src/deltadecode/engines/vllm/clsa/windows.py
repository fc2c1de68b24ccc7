"""The backend of layers with a window, without a schedule that is made ahead of a step."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def without_schedule(backend: type[Any]) -> type[Any]:
    """A backend as vLLM has chosen it, whose metadata never holds a schedule.

    FlashAttention 3 plans ahead how a batch is split. The plan of a window is wrong in whole-step
    graphs (vLLM's pull request 54374, for drafters), and vLLM drops it only for a model that has
    other windows, too. Without a plan the kernel makes its own, within the graph.
    """
    chosen = backend.get_builder_cls()

    class WindowBuilder(chosen):  # type: ignore[misc, valid-type]
        """Metadata of the chosen backend."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # FlashAttention's builder asks for it at each step; to others it means nothing.
            self.aot_schedule = False

    class WindowBackend(backend):
        """The chosen backend."""

        @staticmethod
        def get_builder_cls() -> type[Any]:
            """Class of the metadata builder."""
            return WindowBuilder

    return WindowBackend
