"""A small learned index of a frozen model: what its layers will attend to, from hidden states.

An index has one or a few *sources*. At a source layer one query and one key a token, of one head,
are made from the layer's attention input h (normed, as the model's own projections see it):

    q_t = R(t) W_Q h_t,   k_s = R(s) W_K h_s,   I_ts = q_t · k_s / sqrt(width),   s <= t

R rotates the first ``rotary`` channels as rotary positions do. The softmax of I_t is to be the
attention of the layers from this source up to the next one: the mean of their weights over layers
and heads (CLSA's target), or the largest of them (what DELTA's page scores are made of), which is
then normed to a sum of 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from deltadecode.engines.transformers.bind import find_decoder
from deltadecode.engines.transformers.full import full_attention
from deltadecode.engines.transformers.swap import attending
from deltadecode.lab.policies.base import Scores

NAME = "deltadecode_index_target"


@dataclass(frozen=True)
class IndexConfig:
    """Shape of an index.

    Attributes
    ----------
    sources
        Layers, ascending; layers before the first one read everything.
    hidden, width, rotary
        Of hidden states, of queries and keys, and how many of the latter's channels rotate.
    base
        Of the rotation.
    token
        Numbers that a token's key and value have in one layer of the model, to count reads.
    target
        ``mean`` or ``max``, over layers and heads.
    """

    sources: tuple[int, ...]
    hidden: int
    width: int = 64
    rotary: int = 32
    base: float = 1e5
    token: int = 384
    target: str = "mean"


class Index(nn.Module):
    """Queries and keys of all sources."""

    def __init__(self, config: IndexConfig) -> None:
        super().__init__()
        self.config = config
        count = len(config.sources)
        scale = config.hidden**-0.5
        shape = (count, config.width, config.hidden)
        self.query = nn.Parameter(torch.randn(shape) * scale)
        self.key = nn.Parameter(torch.randn(shape) * scale)

    def project(self, place: int, states: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Queries and keys [..., T, width] float32 of hidden states [..., T, hidden].

        ``first`` is the slot of the first of them: only differences of slots matter.
        """
        states = states.float()
        return tuple(  # type: ignore[return-value]
            self._rotated(states @ weight[place].T, first) for weight in (self.query, self.key)
        )

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        """[..., Q, T] from queries [..., Q, width] and keys [..., T, width]."""
        return query @ key.transpose(-1, -2) * self.config.width**-0.5

    def _rotated(self, x: Tensor, first: int) -> Tensor:
        channels = self.config.rotary
        if not channels:
            return x
        half = torch.arange(channels // 2, device=x.device, dtype=torch.float32)
        slot = torch.arange(first, first + x.shape[-2], device=x.device, dtype=torch.float32)
        angle = slot[:, None] * self.config.base ** (-2 * half / channels)
        a, b, rest = x.split([channels // 2, channels // 2, x.shape[-1] - channels], dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    def save(self, path: Path, **more: Any) -> None:
        """Write it in one piece."""
        torch.save({"config": asdict(self.config), "weights": self.state_dict(), **more},
                   path.with_suffix(".new"))  # fmt: skip
        path.with_suffix(".new").replace(path)

    @classmethod
    def load(cls, path: Path) -> Index:
        """Read what :meth:`save` has written."""
        saved = torch.load(path, map_location="cpu")
        index = cls(IndexConfig(**saved["config"]))
        index.load_state_dict(saved["weights"])
        return index


def groups(sources: tuple[int, ...], layers: int) -> list[range]:
    """For each source, the layers that take its pages: up to the next source."""
    return [range(a, b) for a, b in zip(sources, (*sources[1:], layers), strict=True)]


def inputs_of(kwargs: dict[str, Any], args: tuple[Any, ...]) -> Tensor:
    """Hidden states that an attention module was called with."""
    states: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return states


@dataclass
class Observation:
    """What one pass of a frozen model over a text [1, T] shows.

    Attributes
    ----------
    queries
        [Q] int64, the tokens whose attention is a target.
    states
        Per layer asked for, the input of its attention, [T, hidden].
    targets
        By ``mean`` or ``max`` over heads, then per layer: weights of the queries, [Q, T] float32.
    """

    queries: Tensor
    first: int  # layers before it are no targets
    states: dict[int, Tensor] = field(default_factory=dict)
    targets: dict[str, dict[int, Tensor]] = field(default_factory=lambda: {"mean": {}, "max": {}})

    def target(self, layers: range, over: str = "mean") -> Tensor:
        """[Q, T], over layers and heads."""
        stacked = torch.stack([self.targets[over][layer] for layer in layers])
        return stacked.mean(dim=0) if over == "mean" else stacked.amax(dim=0)


@torch.no_grad()
def observe(model: Any, ids: Tensor, queries: Tensor, sources: set[int]) -> Observation:
    """Run a text ids [T] through a model, and keep what an index learns from."""
    seen = Observation(queries, min(sources))
    planned = find_decoder(model).planned

    def keeping(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.states[layer] = inputs_of(kwargs, args)[0]

        return hook

    handles = [
        planned[layer].register_forward_pre_hook(keeping(layer), with_kwargs=True)
        for layer in sorted(sources)
    ]
    try:
        with attending(model, NAME, seen):
            model(ids[None], use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def observed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Full attention, and the weights of some queries kept on the side."""
    out = full_attention(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    seen: Observation = getattr(module, NAME)
    if module.layer_idx >= seen.first:
        scores = Scores.of(query.shape[3], scaling, kwargs)
        tokens = torch.arange(key.shape[2], device=key.device)
        logits = scores.logits(query[:, :, seen.queries], key)
        weights = scores.weights(logits, tokens <= seen.queries[:, None])
        seen.targets["mean"][module.layer_idx] = weights.mean(dim=(1, 2))[0]
        seen.targets["max"][module.layer_idx] = weights.amax(dim=(1, 2))[0]
    return out, None


AttentionInterface.register(NAME, observed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def index_loss(index: Index, seen: Observation, forced: Tensor, layers: int) -> Tensor:
    """Mean over sources and queries of KL(target || index) in nats, outside of what is forced.

    ``forced`` [Q, T] are tokens that are read whatever the index says. The target's mass on the
    others, at most 1, weighs each query.
    """
    query_ids, tokens = seen.queries, seen.states[seen.first].shape[0]
    token = torch.arange(tokens, device=forced.device)
    open_ = (token <= query_ids[:, None]) & ~forced
    losses = []
    for place, group in enumerate(groups(index.config.sources, layers)):
        query, key = index.project(place, seen.states[index.config.sources[place]], 0)
        logits = index.logits(query[query_ids], key).masked_fill(~open_, -torch.inf)
        log_q = logits.log_softmax(dim=1).masked_fill(~open_, 0.0)
        target = seen.target(group, index.config.target).masked_fill(~open_, 0.0)
        mass = target.sum(dim=1, keepdim=True).clamp(min=1e-9)
        p = target / mass
        divergence = (p * (p.clamp(min=1e-30).log() - log_q)).sum(dim=1)
        losses.append((mass[:, 0].clamp(max=1) * divergence).mean())
    return torch.stack(losses).mean()


class Watch:
    """Queries and keys of an index, as a model is run: keys of all slots, queries of the newest.

    A pass with nothing in its cache starts anew; any other one writes behind what is in the cache.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self.keys: dict[int, Tensor] = {}  # by layer, [B, capacity, width]
        self.query: dict[int, Tensor] = {}  # [B, new, width]

    def see(self, place: int, states: Tensor, past: int) -> None:
        """Take the hidden states [B, new, hidden] of a source behind ``past`` slots."""
        layer = self.index.config.sources[place]
        self.query[layer], new = self.index.project(place, states, past)
        end = past + new.shape[1]
        held = self.keys.get(layer)
        if past == 0:
            self.keys[layer] = held = new.new_zeros((len(new), end + 256, new.shape[2]))
        assert held is not None
        if end > held.shape[1]:
            self.keys[layer] = held = nn.functional.pad(held, (0, 0, 0, 1024))
        held[:, past:end] = new

    def logits(self, layer: int, slots: int) -> Tensor:
        """[B, new, slots] float32 of a source."""
        return self.index.logits(self.query[layer], self.keys[layer][:, :slots])


@contextmanager
def watching(model: Any, watches: list[Watch]) -> Iterator[None]:
    """While it lasts, every pass of the model is seen by the indexes."""
    planned = find_decoder(model).planned

    def seeing(watch: Watch, place: int, layer: int) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            cache = kwargs.get("past_key_values")
            past = 0 if cache is None else int(cache.get_seq_length(layer))
            watch.see(place, inputs_of(kwargs, args), past)

        return hook

    handles = [
        planned[layer].register_forward_pre_hook(seeing(watch, place, layer), with_kwargs=True)
        for watch in watches
        for place, layer in enumerate(watch.index.config.sources)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
