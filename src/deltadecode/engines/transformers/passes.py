"""Forward passes of lossless decoding from a static cache, on a GPU as CUDA graphs.

A draft is one graph. A verification is one of no drafts, one of the most there may be, and, where
their number is chosen, one of each power of two. Another number is filled up with tokens that are
taken back.
"""

from __future__ import annotations

import warnings
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltadecode.engines.transformers.lossless import Phase
from deltadecode.engines.transformers.lossless_static import StaticDrafting
from deltadecode.engines.transformers.state import ModelState
from deltadecode.engines.transformers.static_cache import DeltaStaticCache, static_layers
from deltadecode.ops.graphs import Graph

# What a pass makes for itself, or gets anew. With another tensor no graph is captured.
_MADE = {"input_ids", "position_ids", "attention_mask", "past_key_values"}


class Passes:
    """What the passes from one cache have in common, kept with the cache for later calls.

    It holds neither model nor cache: both would stay in memory for longer than they are used.

    Parameters
    ----------
    state : ModelState
        Of the model that decodes.
    cache : DeltaStaticCache
        That holds the prompt.
    offsets : list of int
        Slot of each row's first token.

    Attributes
    ----------
    drafting : StaticDrafting
        What drafts of these passes read.
    fresh : bool
        Whether a graph was captured since this was last set to False.
    """

    def __init__(self, state: ModelState, cache: DeltaStaticCache, offsets: list[int]) -> None:
        self.drafting = StaticDrafting(state, cache, offsets)
        self.fresh = False
        self._first, self._most, self._room = state.first, state.draft_tokens, cache.room
        self._fixed_count = state.draft_fixed
        self._mask = torch.zeros(
            len(offsets), cache.room, dtype=torch.int64, device=self.drafting.device
        )
        self._fixed: dict[str, Any] | None = None
        self._known: Any = None
        self._graphs: dict[tuple[Phase, int, bool], tuple[Tensor, Graph]] = {}
        self._pool: Any = None

    @classmethod
    def of(
        cls, model: Any, state: ModelState, cache: DeltaStaticCache, offsets: list[int]
    ) -> Passes:
        """Those of the cache if they are of this model as it is now, or new ones."""
        passes: Passes | None = cache.passes
        known = _identity(model)
        if (
            passes is None
            or passes.drafting.state is not state
            or len(passes.drafting.offsets) != len(offsets)
            or known is None
            or passes._known != known
        ):
            passes = cache.passes = cls(state, cache, offsets)
            passes._known = known
        passes.begin(offsets)
        return passes

    @property
    def captured(self) -> bool:
        """Whether there are graphs."""
        return bool(self._graphs)

    def begin(self, offsets: list[int]) -> None:
        """Begin a call of ``generate``."""
        self.drafting.restart(offsets)
        slots = torch.arange(self._room, device=self._mask.device)
        self._mask.copy_(slots >= torch.tensor(offsets, device=slots.device)[:, None])
        self._ready = False

    def see(self, inputs: dict[str, Any], start: int) -> None:
        """Look at what the model gets in its first pass, of the tokens from slot ``start`` on.

        Later passes are captured where all of it can be told before.
        """
        if self._ready:
            return
        self._ready = True
        fixed = {name: value for name, value in inputs.items() if name not in _MADE}
        positions = inputs.get("position_ids")
        fixed["positions"] = isinstance(positions, Tensor)
        ours = start - torch.tensor(self.drafting.offsets)[:, None]
        told = not any(isinstance(value, Tensor) for value in fixed.values()) and (
            positions is None
            or (isinstance(positions, Tensor) and torch.equal(positions.cpu(), ours))
        )
        seen = fixed if told else None
        if seen != self._fixed:
            self._fixed, self._graphs = seen, {}

    def room_for(self, end: int, count: int) -> int:
        """Tokens of the pass that is captured for ``count`` ones which end at a slot; 0: none."""
        if not self._ready or self._fixed is None:
            return 0
        tokens = 1 + widened(count - 1, self._most, self._fixed_count)
        return tokens if end - count + tokens <= self._room else 0

    def run(self, model: Any, cache: DeltaStaticCache, ids: Tensor) -> Tensor | None:
        """Logits of the tokens [B, Q], which the next pass overwrites; None: no graph holds it."""
        key = self.drafting.phase, ids.shape[1], self.drafting.scores
        if key not in self._graphs:
            self._pool = self._pool or graph_pool()
            held, lengths = ids.clone(), cache.lengths
            try:
                graph = Graph(
                    partial(self._pass, model, cache, held),
                    partial(torch._foreach_copy_, lengths, [length.clone() for length in lengths]),
                    self._pool,
                    # The first graph is of one token. For more, masks are made by a look at the
                    # cache, but not while they are captured.
                    ids.shape[1] == 1,
                )
            except RuntimeError as error:
                self._fixed, self._graphs = None, {}
                reason = str(error).splitlines()[0]
                warnings.warn(
                    f"lossless decoding goes on without CUDA graphs: {type(model).__name__} cannot "
                    f"be captured, {reason}",
                    stacklevel=2,
                )
                return None
            self._graphs[key] = held, graph
            self.fresh = True
        held, graph = self._graphs[key]
        held.copy_(ids)
        return graph.replay()

    def _pass(self, model: Any, cache: DeltaStaticCache, ids: Tensor) -> Tensor:
        assert self._fixed is not None
        inputs = {**self._fixed, "input_ids": ids, "attention_mask": self._mask}
        first: Any = cache.layers[self._first]
        if inputs.pop("positions"):
            slots = first.cumulative_length + torch.arange(ids.shape[1], device=ids.device)
            inputs["position_ids"] = slots - self.drafting.first_slots[:, None]
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = ids.shape[1]
        logits: Tensor = model(**inputs, past_key_values=cache, return_dict=True).logits
        return logits[:, -ids.shape[1] :]


class Kept:
    """Buffers and graphs of a cache that ``generate`` made, for the next call of the same sizes."""

    def __init__(self, cache: DeltaStaticCache) -> None:
        self._owner = weakref.ref(cache)
        self._layers, self._passes = cache.layers, cache.passes

    def lend(self, cache: DeltaStaticCache, rows: int) -> bool:
        """Give them to a cache that has none, unless it differs, or somebody holds the first."""
        layers = static_layers(self._layers)
        keys = layers[0].keys
        if (
            self._owner() is not None
            or cache.is_initialized
            or keys.is_inference() != torch.is_inference_mode_enabled()
            or (keys.shape[0], layers[0].max_cache_len) != (rows, cache.room)
        ):
            return False
        cache.layers, cache.passes = self._layers, self._passes
        cache.empty()
        self._owner = weakref.ref(cache)
        return True


def widened(drafts: int, most: int, fixed: bool) -> int:
    """Drafts that a graph verifies together where so many are to be."""
    if drafts == 0:
        return 0
    return most if fixed else min(most, 1 << (drafts - 1).bit_length())


def narrowed(drafts: int, most: int) -> int:
    """The most drafts, no more than so many, that a graph verifies without filling up."""
    return drafts if drafts in (0, most) else 1 << (drafts.bit_length() - 1)


def graph_pool() -> Any:
    """Memory that the graphs of one cache share."""
    return torch.cuda.graph_pool_handle()


def on_gpu(cache: DeltaStaticCache) -> bool:
    """Whether all of a cache is on one GPU."""
    devices = {layer.device for layer in static_layers(cache.layers) if layer.is_initialized}
    return len(devices) == 1 and devices.pop().type == "cuda"


def _identity(model: nn.Module) -> Any:
    """What a graph has frozen of a model; None where adapters may be switched between two calls."""
    if any(hasattr(module, "base_layer") for module in model.modules()):
        return None
    return [part.data_ptr() for part in (*model.parameters(), *model.buffers())]
