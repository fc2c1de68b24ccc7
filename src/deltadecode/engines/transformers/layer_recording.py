"""One decoder layer at a decode step, recorded as two pieces around its cache and its attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltadecode.engines.transformers.layer_pieces import Piece
from deltadecode.engines.transformers.layer_watch import RefusedError, Watch

# A decoder layer, and the function that attends for its attention module.
Layer = Callable[..., Any]
Attend = Callable[..., tuple[Tensor, None]]


@dataclass(frozen=True)
class Recording:
    """What a layer does at a decode step; every tensor in it stays in its place.

    Attributes
    ----------
    inputs : sequence of Tensor
        What the first piece reads of the token.
    before, behind : Piece
        What comes before the cache is updated, and behind attention.
    states : tuple
        Key, value and whatever else the cache's ``update`` gets.
    options : dict
        Keyword arguments of ``update``.
    attend, module, query, kwargs
        The attention function, and all that it gets but keys, values and mask.
    masked : bool
        Whether it gets the layer's mask.
    attended : Tensor
        Output of attention, which the second piece reads.
    result
        What the layer returns.
    """

    inputs: Sequence[Tensor]
    before: Piece
    behind: Piece
    states: tuple[Any, ...]
    options: dict[str, Any]
    attend: Attend
    module: nn.Module
    query: Tensor
    kwargs: dict[str, Any]
    masked: bool
    attended: Tensor
    result: Any

    def replay(self, cache: Any, mask: Tensor | None) -> Any:
        """Run the layer on its inputs, which hold this step's; mask and cache are this step's."""
        self.before.replay()
        key, value = cache.update(*self.states, **self.options)
        given = mask if self.masked else None
        out, _ = self.attend(self.module, self.query, key, value, given, **self.kwargs)
        self.attended.copy_(out)
        self.behind.replay()
        return self.result


class Recorder:
    """Runs a layer once, and records it.

    Parameters
    ----------
    make : callable
        Makes a piece.
    local
        Where attention finds this recorder, as ``recorder``.
    cache
        The cache of this step.
    mask : Tensor or None
        The layer's mask at this step.
    device : torch.device
        Of the layer.
    given : sequence of Tensor
        Its parameters and buffers.
    inputs : sequence of Tensor
        What it gets of the token, in the order of the recording.

    Attributes
    ----------
    failed : bool
        Whether an exception came from the cache or from attention, which were not recorded.
    """

    def __init__(
        self,
        make: Callable[[], Piece],
        local: Any,
        cache: Any,
        mask: Tensor | None,
        device: torch.device,
        given: Sequence[Tensor],
        inputs: Sequence[Tensor],
    ) -> None:
        self._make, self._local, self._cache, self._mask = make, local, cache, mask
        self._inputs = inputs
        self._watch = Watch(device, [*given, *inputs])
        self._watching = self._finishing = self.failed = False
        self._pieces: list[Piece] = []
        self._open: Piece | None = None
        self._update = cache.update
        # What the cache and attention got, and what they gave.
        self._states: tuple[Any, dict[str, Any]] | None = None
        self._call: dict[str, Any] = {}
        self._stored: Any = None
        self._attended: Tensor | None = None
        self._result: Any = None

    @property
    def reason(self) -> str | None:
        """Why there is no recording, though the layer has run."""
        return self._watch.reason

    def run(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer whose arguments are the inputs; gives what it returns.

        Raises
        ------
        RefusedError
            When it cannot be recorded. :meth:`finish` then runs it, as behind every exception but
            those of :attr:`failed`.
        """
        with self._in_place():
            try:
                self._begin()
                out = layer(*args, **kwargs)
                if self._attended is None:
                    raise RefusedError("does not attend to what it stores")
                if self.reason is None:
                    self._end()
            except BaseException:
                self._abort()
                raise
        if self.reason is None and not _is_result(self._watch, out):
            self._watch.reason = "returns more than hidden states"
        self._result = out
        return out

    def finish(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer as it is, after an error: a token that is stored is not stored again."""
        self._finishing = True
        with self._in_place():
            return layer(*args, **kwargs)

    def recording(self) -> Recording:
        """What was recorded, where there is no reason against it."""
        assert self._states is not None and self._attended is not None
        before, behind = self._pieces
        return Recording(
            self._inputs, before, behind, *self._states, **self._call, attended=self._attended,
            result=self._result,
        )  # fmt: skip

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of the cache's ``update``, while the layer runs."""
        if self._finishing:
            stored, self._stored = self._stored, None
            return self._update(*args, **kwargs) if stored is None else stored
        if self._open is None:
            self._watch.reason = self.reason or "updates its cache twice"
            return self._update(*args, **kwargs)
        if self._states is not None:
            raise RefusedError("updates its cache twice")
        if len(args) < 2 or not all(map(self._watch.made, args[:2])):
            raise RefusedError("stores keys and values that it has not made")
        if not self._watch.stays((args, kwargs)):
            raise RefusedError("gives its cache more than the token's tensors")
        self._end()
        self._stored = self._eagerly(self._update, args, kwargs)
        self._states = args, kwargs
        self._watch.between = True
        self._see()
        return self._stored

    def attend(
        self,
        attend: Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, None]:
        """In the place of attention, while the layer runs."""
        arguments = module, query, key, value, mask
        if self._finishing and self._attended is not None:
            attended, self._attended = self._attended, None
            return attended, None
        if self._finishing or (self._open is None and self._attended is not None):
            return self._eagerly(attend, arguments, kwargs)  # type: ignore[no-any-return]
        if self._open is not None:
            first = self._attended is None
            raise RefusedError(f"attends {'to keys that it does not store' if first else 'twice'}")
        self._look_away()
        self._watch.reason = self.reason or self._unlike(query, key, value, mask, kwargs)
        out, _ = self._eagerly(attend, arguments, kwargs)
        if self.reason is not None:
            self._attended = out
            return out, None
        with torch.inference_mode(False):
            self._attended = torch.empty_like(out)
        self._attended.copy_(out)
        self._call = {
            "attend": attend, "module": module, "query": query, "kwargs": kwargs,
            "masked": mask is not None,
        }  # fmt: skip
        self._watch.allow(self._attended)
        self._watch.between = False
        self._begin()
        return self._attended, None

    def _unlike(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> str | None:
        """Why attention could not be called like this at another step."""
        if key is not self._stored[0] or value is not self._stored[1]:
            return "attends to other keys than its cache gives"
        if mask is not None and mask is not self._mask:
            return "attends with a mask of its own"
        if not self._watch.made(query) or not self._watch.stays(kwargs):
            return "gives its attention more than the token's tensors"
        return "drops weights at random" if kwargs.get("dropout") else None

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """While it lasts, the cache and attention come here."""
        own = vars(self._cache)
        before = own.get("update")
        own["update"], self._local.recorder = self.update, self
        try:
            yield
        finally:
            self._local.recorder = None
            del own["update"]
            if before is not None:
                own["update"] = before

    def _eagerly(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call what is not recorded, as it is called without a recorder."""
        self._local.recorder, self.failed = None, True
        out = function(*args, **kwargs)
        self._local.recorder, self.failed = self, False
        return out

    def _begin(self) -> None:
        piece = self._make()
        piece.begin()
        self._open = piece
        self._see()

    def _end(self) -> None:
        """End a piece and run it: until now its tensors hold nothing."""
        piece = self._open
        assert piece is not None
        self._look_away()
        self._open = None
        piece.end()
        piece.replay()
        self._pieces.append(piece)

    def _abort(self) -> None:
        self._look_away()
        piece, self._open = self._open, None
        if piece is not None:
            # That nothing was recorded yet is no news, and nor is that the capture is over.
            with suppress(RuntimeError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                piece.end()

    def _see(self) -> None:
        self._watch.__enter__()
        self._watching = True

    def _look_away(self) -> None:
        if self._watching:
            self._watching = False
            self._watch.__exit__(None, None, None)


def _is_result(watch: Watch, out: Any) -> bool:
    first, *others = out if isinstance(out, tuple) and out else (out,)
    return watch.made(first) and all(other is None for other in others)
