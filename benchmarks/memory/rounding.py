"""What a cache of eight-bit numbers would lose: the reference of its rounding, and the measurement.

Keys and values are rounded and written back in the model's type, so nothing here saves memory or
time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import deltadecode as dd
from benchmarks.memory.selections import pieces_of
from benchmarks.report import Progress
from deltadecode.lab.results import row

FLOAT8 = torch.float8_e4m3fn
_MOST = torch.finfo(FLOAT8).max
# Binades left above the largest number of a prompt, for tokens to come.
_HEADROOM = 1

UNIT = "KL to full attention, nats a token"


@dataclass(frozen=True)
class Rounding:
    """How the keys and values of one row are rounded.

    Attributes
    ----------
    number : str
        ``"bfloat16"``, ``"float8"`` (e4m3) or ``"int8"``.
    scales : str
        What has a scale of its own: ``"none"`` (all are 1), ``"head"`` (a KV head of a layer),
        ``"page"`` (a page of a head) or ``"token"`` (a token of a head: always with int8).
    protected : int
        First pages that keep bfloat16.
    of : str
        ``"keys"`` or ``"values"`` alone, or ``"both"``; the others are bfloat16.
    centred : bool
        Keys are rounded less the mean key of their head in the prompt. What all keys have in common
        adds the same to all logits of a query, so a softmax without sinks or soft-cap does not
        need it.
    """

    number: str
    scales: str = ""
    protected: int = 0
    of: str = "both"
    centred: bool = False

    @property
    def name(self) -> str:
        """As rows have it."""
        parts = [f"{self.number}, scales: {self.scales}"]
        if self.of != "both":
            parts.append(f"{self.of} alone")
        if self.centred:
            parts.append("keys less their mean")
        if self.protected:
            parts.append(f"{self.protected} first pages in bfloat16")
        return ", ".join(parts)

    def of_side(self, side: str) -> Rounding:
        """That of the keys or of the values."""
        if self.of not in ("both", side):
            return ROUNDINGS[0]
        return self if side == "keys" else replace(self, centred=False)


ROUNDINGS = (
    Rounding("bfloat16"),
    Rounding("float8", "none"),
    Rounding("float8", "head"),
    Rounding("float8", "page"),
    Rounding("float8", "head", protected=1),
    Rounding("float8", "head", protected=1, of="keys"),
    Rounding("float8", "head", protected=1, of="values"),
    Rounding("float8", "head", centred=True),
    Rounding("float8", "head", protected=1, centred=True),
    Rounding("int8", "token"),
    Rounding("int8", "token", protected=1),
    Rounding("int8", "token", centred=True),
)
_SIDES = ("keys", "values")


def round_float8(states: Tensor, scale: Tensor) -> Tensor:
    """States as float8 holds them over a scale; what is beyond its largest number becomes that."""
    over = (states.float() / scale).clamp(-_MOST, _MOST)
    return (over.to(FLOAT8).float() * scale).to(states.dtype)


def round_int8(states: Tensor) -> Tensor:
    """States [..., D] as 127 steps to either side of zero hold them, each token by its largest."""
    scale = states.float().abs().amax(dim=-1, keepdim=True).clamp(min=2.0**-100) / 127
    return ((states.float() / scale).round() * scale).to(states.dtype)


def scale_of(states: Tensor) -> Tensor:
    """Power of two for each head of states [..., T, D], [..., 1, 1] float32."""
    most = states.float().abs().amax(dim=(-2, -1), keepdim=True).clamp(min=2.0**-100)
    return torch.exp2((most / _MOST).log2().ceil() + _HEADROOM)


@dataclass(frozen=True)
class Frame:
    """What tokens of one head are rounded by: ``scale`` [Hkv, 1, 1] and ``mean`` [Hkv, 1, D]."""

    scale: Tensor
    mean: Tensor

    @classmethod
    def of(cls, states: Tensor, rounding: Rounding) -> Frame:
        """That of a prompt's states [Hkv, T, D]."""
        mean = states.mean(dim=1, keepdim=True).bfloat16().to(states.dtype)
        mean = mean if rounding.centred else torch.zeros_like(mean)
        scale = scale_of(states - mean)
        return cls(torch.ones_like(scale) if rounding.scales == "none" else scale, mean)


def round_prompt(states: Tensor, rounding: Rounding, page_size: int) -> tuple[Tensor, Frame]:
    """States [Hkv, T, D] of a prompt, rounded; and by what tokens to come are."""
    frame = Frame.of(states, rounding)
    pages = [states]
    if rounding.scales == "page":
        pages = list(states.split(page_size, dim=1))
    rounded = torch.cat(
        [
            round_token(page, rounding, frame if len(pages) == 1 else Frame.of(page, rounding))
            for page in pages
        ],
        dim=1,
    )
    kept = rounding.protected * page_size
    rounded[:, :kept] = states[:, :kept].bfloat16().to(states.dtype)
    return rounded, frame


def round_token(states: Tensor, rounding: Rounding, frame: Frame) -> Tensor:
    """States [Hkv, T, D] as they are read back."""
    half = states.bfloat16().to(states.dtype)
    if rounding.number == "bfloat16":
        return half
    apart = half - frame.mean
    rounded = round_int8(apart) if rounding.number == "int8" else round_float8(apart, frame.scale)
    return rounded + frame.mean


class RoundedCache(dd.DeltaCache):
    """A cache with the same prompt in every row, each row rounded in its own way."""

    def __init__(
        self, config: Any, prompt: DynamicCache, roundings: Sequence[Rounding], page_size: int
    ) -> None:
        super().__init__(config)
        self.roundings = roundings
        # Layer -> frames of keys and of values, of each row.
        self.frames: dict[int, list[list[Frame]]] = {}
        stored: list[Any] = prompt.layers
        for number, layer in enumerate(stored):
            rounded = [
                [
                    round_prompt(getattr(layer, side)[0], one.of_side(side), page_size)
                    for one in roundings
                ]
                for side in _SIDES
            ]
            keys, values = (torch.stack([states for states, _ in side]) for side in rounded)
            super().update(keys, values, number)
            self.frames[number] = [[frame for _, frame in side] for side in rounded]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one token, rounded."""
        if layer_idx in self.frames:
            key_states, value_states = (
                torch.stack(
                    [
                        round_token(states[row], one.of_side(side), frames[row])
                        for row, one in enumerate(self.roundings)
                    ]
                )
                for side, states, frames in zip(
                    _SIDES, (key_states, value_states), self.frames[layer_idx], strict=True
                )
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.inference_mode()
def losses(
    model: Any,
    tokenizer: Any,
    plans: Sequence[dd.DeltaConfig],
    contexts: Sequence[int],
    **asked: Any,
) -> list[dict[str, Any]]:
    """A row for each context and rounding, as :func:`loss_rows` makes them.

    A prompt's tokens attend to each other before they are rounded.
    """
    roundings = {
        one.name: {
            "number": one.number, "scales": one.scales, "protected": one.protected, "of": one.of,
            "centred": one.centred,
        }
        for one in ROUNDINGS[1:]
    }  # fmt: skip
    return loss_rows(model, tokenizer, plans, contexts, roundings, _text_losses, **asked)


def loss_rows(
    model: Any,
    tokenizer: Any,
    plans: Sequence[dd.DeltaConfig],
    contexts: Sequence[int],
    kinds: Mapping[str, Mapping[str, Any]],
    measure: Callable[..., Tensor],
    *,
    texts: int,
    steps: int,
    file: str = "",
    progress: Progress = lambda case, done: None,
) -> list[dict[str, Any]]:
    """A row for each context, plan and kind of cache: KL(full attention ‖ DELTA), over all steps.

    ``kinds`` are names of caches and what rows say of them. ``measure`` gives the mean KL over the
    steps of one text, of a cache that holds bfloat16 and then of each kind. Full attention has a
    cache of the model's type. ``added`` is what a kind adds to the KL of bfloat16; ``of_texts`` has
    that of each text.
    """
    rows: list[dict[str, Any]] = []
    parts = len(plans) * len(contexts)
    for at, (context, plan) in enumerate(product(contexts, plans)):
        found = []
        for number, ids in enumerate(pieces_of(tokenizer, context + steps + 1, texts, file)):
            case = f"context {context}, text {number}: K {plan.budget_pages}"
            progress(case, (at + number / texts) / parts)
            found.append(measure(model, plan, ids, context, steps))
        base, *others = torch.stack(found).T
        for (name, facts), means in zip(kinds.items(), others, strict=True):
            added = means - base
            rows.append(
                row(
                    f"context {context}, K {plan.budget_pages}: {name}", "bfloat16", UNIT,
                    float(means.mean()), float(base.mean()), context=context,
                    budget_pages=plan.budget_pages, page_size=plan.page_size, texts=len(found),
                    steps=steps, **facts, added=round(float(added.mean()), 6),
                    of_texts=[round(one, 6) for one in added.tolist()],
                )
            )  # fmt: skip
    dd.disable(model)
    return rows


def _text_losses(model: Any, plan: dd.DeltaConfig, ids: Tensor, context: int, steps: int) -> Tensor:
    """Mean KL over the steps, of each rounding."""
    dd.disable(model)
    full = DynamicCache(config=model.config)
    model(ids[:, :context], past_key_values=full, logits_to_keep=1)
    cache = RoundedCache(model.config, full, ROUNDINGS, plan.page_size)
    total = torch.zeros(len(ROUNDINGS))
    for step in range(context, context + steps):
        token = ids[:, step : step + 1]
        dd.disable(model)
        stock = model(token, past_key_values=full).logits[:, -1].float().log_softmax(-1)
        dd.enable(model, plan)
        logits = model(token.expand(len(ROUNDINGS), -1), past_key_values=cache).logits
        ours = logits[:, -1].float().log_softmax(-1)
        total += (stock.exp() * (stock - ours)).sum(dim=-1)
    return total / steps
