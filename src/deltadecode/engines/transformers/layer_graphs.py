"""Layer graphs: decode steps from growing caches, with all but cache and attention in CUDA graphs.

A step from a :class:`DeltaCache` cannot be one graph: its length, its pages and what it fetches are
Python's. So every decoder layer is two graphs, one before its cache and one behind its attention.
The model's own loop over layers stays as it is.
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltadecode.engines.transformers import layer_pieces
from deltadecode.engines.transformers.cache import DeltaCache
from deltadecode.engines.transformers.layer_frozen import Frozen
from deltadecode.engines.transformers.layer_recording import Recorder, Recording
from deltadecode.engines.transformers.layer_watch import RefusedError

# Of one layer: batch sizes and whatever else its recordings differ in.
_MOST = 8
_OTHER = object()
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class LayerGraphs:
    """The layer graphs of one model.

    One thread at a time decodes with them; to another one the layers are what they were.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: threading.Thread | None = None
        self._frozen: Frozen | None = None
        self._warned = False
        self._pieces: layer_pieces.Pieces | None = None

    def begin(
        self, model: nn.Module, state: Any, cache: Any, wanted: dict[str, Any]
    ) -> LayerPass | None:
        """Begin a decode step; None where its layers run as they are.

        ``wanted`` are the keyword arguments of ``model.forward``.
        """
        if (
            torch.is_grad_enabled()
            or not isinstance(cache, DeltaCache)
            or cache.get_seq_length() == 0
            or _collects(model, wanted)
        ):
            return None
        if self._frozen is None or self._frozen.changed():
            found = _wrapped(model)
            self._frozen, self._pieces = Frozen(model, list(found)), None
            for forward in found.values():
                forward.recordings.clear()
        device = self._frozen.device
        if device is None or self._frozen.hooked() or torch.is_autocast_enabled(device.type):
            return None
        if self._pieces is None:
            self._pieces = layer_pieces.Pieces(device)
        if not self._pieces.ready() or not self._take():
            return None
        return LayerPass(self, state, cache, self._pieces, device)

    def end(self) -> None:
        """Let other threads have them."""
        self._owner = None

    def warn(self, layer: nn.Module, reason: str) -> None:
        """Say once why layers run as they are."""
        if not self._warned:
            self._warned = True
            name = type(layer).__name__
            warnings.warn(
                f"{name} {reason}: it decodes without layer graphs, and so may others of this "
                "model",
                stacklevel=2,
            )

    def _take(self) -> bool:
        me = threading.current_thread()
        with self._lock:
            # A pass that broke off may have left it.
            owner = self._owner
            if owner is not None and owner is not me and owner.is_alive():
                return False
            self._owner = me
        return True


class LayerForward:
    """In the place of a decoder layer's ``forward``.

    Parameters
    ----------
    state : ModelState
        Of the model.
    layer : nn.Module
        The layer.
    last : bool
        Whether it is the model's last one.

    Attributes
    ----------
    recordings : dict
        What a call looks like -> its recording; None once such a call was seen.
    refused : bool
        Whether the layer cannot be recorded.
    """

    def __init__(self, state: Any, layer: nn.Module, last: bool) -> None:
        self.state, self.last = state, last
        self._layer = weakref.ref(layer)
        self._begin()

    def _begin(self) -> None:
        self.recordings: dict[Any, Recording | None] = {}
        self.refused = False
        self.first_name, *_ = self.names = _names(self._layer())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        layer: Any = self._layer()
        current = None if torch.compiler.is_compiling() else self.state.local.graphed
        if current is None:
            return type(layer).forward(layer, *args, **kwargs)
        try:
            out = current.run(self, layer, args, kwargs)
        except BaseException:
            current.end()
            raise
        if self.last:
            current.end()
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerForward:
        # A layer that is copied alone stays with the state of its model.
        state = memo.get(id(self.state), self.state)
        layer: Any = self._layer()
        return LayerForward(state, memo.get(id(layer), layer), self.last)

    def __getstate__(self) -> dict[str, Any]:
        return {"state": self.state, "layer": self._layer(), "last": self.last}

    def __setstate__(self, given: dict[str, Any]) -> None:
        self.state, self.last = given["state"], given["last"]
        self._layer = weakref.ref(given["layer"])
        self._begin()


class LayerPass:
    """One decode step with layer graphs.

    Parameters
    ----------
    graphs : LayerGraphs
        Of the model.
    state : ModelState
        Of the model.
    cache : DeltaCache
        Of this step.
    pieces
        Makes pieces.
    device : torch.device
        Of the model.
    """

    def __init__(
        self, graphs: LayerGraphs, state: Any, cache: Any, pieces: Any, device: torch.device
    ) -> None:
        self._graphs, self._state, self._cache = graphs, state, cache
        self._pieces, self._device = pieces, device
        self._mode = torch.is_inference_mode_enabled()
        # What layers have returned in this step: it stays where it is.
        self._results: dict[int, Tensor] = {}
        # Tensors that several layers get, and the buffers which hold them by now.
        self._held: dict[int, Tensor] = {}
        self._buffers: dict[int, Tensor] = {}
        self._read: dict[int, tuple[Any, Any, list[Tensor]]] = {}

    def end(self) -> None:
        """End the step."""
        self._state.local.graphed = None
        self._graphs.end()

    def run(
        self, forward: LayerForward, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Replay a layer, record it at its second call, or run it as it is."""
        plain = type(layer).forward
        if forward.refused:
            return plain(layer, *args, **kwargs)
        call = self._look(forward, args, kwargs)
        if isinstance(call, str):
            self._graphs.warn(layer, call)
            return plain(layer, *args, **kwargs)
        sign, tensors, mask = call
        recordings = forward.recordings
        if sign not in recordings:
            if len(recordings) < _MOST:
                recordings[sign] = None
            return plain(layer, *args, **kwargs)
        recording = recordings[sign]
        if recording is None:
            out = self._record(forward, layer, sign, tensors, mask, args, kwargs)
        else:
            for place, (given, buffer) in enumerate(zip(tensors, recording.inputs, strict=True)):
                self._fill(given, buffer, shared=place > 0)
            out = recording.replay(self._cache, mask)
        if recordings[sign] is None:
            return out
        first = out[0] if isinstance(out, tuple) else out
        self._results[id(first)] = first
        if forward.last:  # it leaves the model, perhaps as it is
            first = first.clone()
            return (first, *out[1:]) if isinstance(out, tuple) else first
        return out

    def _record(
        self,
        forward: LayerForward,
        layer: Any,
        sign: Any,
        tensors: Sequence[Tensor],
        mask: Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        plain = type(layer).forward.__get__(layer)
        if len({id(tensor) for tensor in tensors}) < len(tensors):  # they may differ at other steps
            forward.refused = True
            self._graphs.warn(layer, "gets one tensor twice")
            return plain(*args, **kwargs)
        inputs = [self._buffer(tensor, shared=place > 0) for place, tensor in enumerate(tensors)]
        found = {id(tensor): buffer for tensor, buffer in zip(tensors, inputs, strict=True)}
        given = [*layer.parameters(), *layer.buffers()]
        recorder = Recorder(
            self._pieces.make, self._state.local, self._cache, mask, self._device, given, inputs
        )
        try:
            out = recorder.run(plain, _with(args, found), _with(kwargs, found))
        except Exception as error:
            if recorder.failed:
                raise
            forward.refused = True
            out = recorder.finish(plain, args, kwargs)
            self._graphs.warn(layer, _reason(error))
        else:
            if recorder.reason is None:
                forward.recordings[sign] = recorder.recording()
            else:
                forward.refused = True
                self._graphs.warn(layer, recorder.reason)
        return out

    def _look(
        self, forward: LayerForward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Tensor], Tensor | None] | str:
        """What a call looks like, its tensors of the token, and its mask; or why not to record it.

        Hidden states come first.
        """
        named = {**dict(zip(forward.names, args, strict=False)), **kwargs}
        hidden = named.get(forward.first_name)
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[1] != 1:
            shape = list(getattr(hidden, "shape", []))
            return f"gets hidden states of shape {shape}, not [rows, 1, size]"
        tensors = [hidden]
        mask: Tensor | None = None
        signs: list[Any] = [self._mode, hidden.shape, hidden.dtype, len(args)]
        for name, value in named.items():
            if value is hidden:
                sign: Any = ("hidden",)
            elif isinstance(value, Tensor) and "mask" in name:
                if mask is not None:
                    return "gets two masks"
                mask, sign = value, ("mask",)
            else:
                sign = self._sign(value, tensors)
                if sign is _OTHER:
                    return f"gets {name}, which no recording can hold"
            signs.append((name, sign))
        return tuple(signs), tensors, mask

    def _sign(self, value: Any, tensors: list[Tensor]) -> Any:
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, Tensor):
            tensors.append(value)
            return (value.shape, value.dtype) if value.device == self._device else _OTHER
        if value is self._cache:
            return ("cache",)
        if type(value) not in (tuple, list):
            return _OTHER
        known = self._read.get(id(value))
        if known is None or known[0] is not value:
            inner: list[Tensor] = []
            signs = tuple(self._sign(part, inner) for part in value)
            known = value, _OTHER if _OTHER in signs else signs, inner
            self._read[id(value)] = known
        tensors.extend(known[2])
        return known[1]

    def _fill(self, given: Tensor, buffer: Tensor, shared: bool) -> None:
        # Hidden states may be changed in their place between two layers.
        if given is buffer or (shared and self._held.get(id(buffer)) is given):
            return
        buffer.copy_(given)
        if shared:
            self._held[id(buffer)], self._buffers[id(given)] = given, buffer

    def _buffer(self, given: Tensor, shared: bool) -> Tensor:
        """A tensor that stays in its place, and holds a given one."""
        if id(given) in self._results:
            return given
        known = self._buffers.get(id(given)) if shared else None
        if known is not None and self._held[id(known)] is given:
            return known
        with torch.inference_mode(False):
            buffer = torch.empty_like(given)
        self._fill(given, buffer, shared)
        return buffer


def wrap_layers(model: nn.Module, state: Any, attentions: Sequence[nn.Module]) -> None:
    """Put layer graphs in the place of ``forward`` of each layer around one attention module."""
    wanted, found = {id(module) for module in attentions}, []
    seen: set[int] = set()
    for layers in model.modules():
        if not isinstance(layers, nn.ModuleList) or id(layers) in seen:
            continue
        for layer in layers:
            inside = list(layer.modules())
            seen.update(map(id, inside))
            # Who has replaced ``forward`` before has a reason.
            if sum(id(part) in wanted for part in inside) == 1 and "forward" not in vars(layer):
                found.append(layer)
    for layer in found:
        vars(layer)["forward"] = LayerForward(state, layer, layer is found[-1])


def unwrap_layers(model: nn.Module) -> None:
    """Take them away."""
    for part in _wrapped(model):
        del vars(part)["forward"]


def _wrapped(model: nn.Module) -> dict[nn.Module, LayerForward]:
    found = {part: vars(part).get("forward") for part in model.modules()}
    return {part: each for part, each in found.items() if isinstance(each, LayerForward)}


def _names(layer: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(type(layer).forward).parameters)[1:]


def _collects(model: Any, wanted: dict[str, Any]) -> bool:
    """Whether a pass returns what layers return, which the next step overwrites."""
    config = model.config
    asked = [name for name in wanted if name.startswith("output_") and wanted[name]]
    return bool(
        asked
        or getattr(config, "output_hidden_states", False)
        or getattr(config, "output_router_logits", False)
    )


def _with(value: Any, found: dict[int, Tensor]) -> Any:
    """The same arguments, with buffers in the place of tensors."""
    if isinstance(value, Tensor):
        return found.get(id(value), value)
    if isinstance(value, (tuple, list)):
        return type(value)(_with(part, found) for part in value)
    if type(value) is dict:
        return {name: _with(part, found) for name, part in value.items()}
    return value


def _reason(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, RefusedError) else f"cannot be recorded ({text})"
