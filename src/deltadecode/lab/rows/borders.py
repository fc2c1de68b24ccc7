"""Hidden states between the layers of earlier passes, so that a pass starts where it departs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from deltadecode.architecture import num_layers, text_config
from deltadecode.engines.transformers.bind import find_decoder, unwrap
from deltadecode.lab.policies.delta import Delta

# One entry a layer: what its output hangs on, besides its input. Equal beginnings of two such
# sequences are equal hidden states.
Steps = tuple[Hashable, ...]


class Memory:
    """Tensors by key; past ``limit`` bytes those go that were not used for the longest time."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __getitem__(self, key: Hashable) -> Tensor:
        self._entries.move_to_end(key)
        return self._entries[key]

    def __setitem__(self, key: Hashable, value: Tensor) -> None:
        if key in self._entries:
            self.used -= self._entries.pop(key).nbytes
        self._entries[key] = value
        self.used += value.nbytes
        while self.used > self.limit:
            _, gone = self._entries.popitem(last=False)
            self.used -= gone.nbytes


def delta_steps(policy: Delta) -> Steps:
    """What each layer of a plan does with its input; dense and Δ-layers do the same."""
    cfg = policy.cfg
    budget = tuple(
        getattr(cfg, field.name)
        for field in fields(cfg)
        if field.name not in ("dense_layers", "delta_layers")
    )
    sources = policy.plan.sources
    return tuple(None if source is None else (source, budget) for source in sources)


def decoder_layers(model: Any) -> list[nn.Module] | None:
    """The decoder layers of a model, in order; None where passes cannot start between them.

    So it is where layers reuse the keys of others, which a pass that starts later would lack.
    """
    config = text_config(model)
    if getattr(config, "num_kv_shared_layers", 0):
        return None
    decoder = find_decoder(unwrap(model))
    for part in decoder.model.modules():
        if not isinstance(part, nn.ModuleList) or len(part) != num_layers(config):
            continue
        if all(
            any(inner is module for inner in part[layer].modules())
            for layer, module in decoder.planned.items()
        ):
            return list(part)
    return None


@contextmanager
def starting_at(
    layers: Sequence[nn.Module], start: int, state: Tensor | None, seen: dict[int, Tensor]
) -> Iterator[None]:
    """While it lasts, a pass begins before layer ``start``, with hidden states ``state``.

    ``seen`` gets the hidden states before every later layer, and those after the last.
    """

    def passing(place: int) -> Any:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
            return state if place == start - 1 else hidden_states

        return forward

    def running(place: int, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            if isinstance(out, Tensor):
                seen[place + 1] = out
            return out

        return forward

    before = [vars(layer).get("forward") for layer in layers]
    try:
        for place, layer in enumerate(layers):
            vars(layer)["forward"] = (
                passing(place) if place < start else running(place, layer.forward)
            )
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            vars(layer).pop("forward")
            if forward is not None:
                vars(layer)["forward"] = forward
