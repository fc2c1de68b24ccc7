"""Generation with full attention that is watched: the attention of some steps, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import StoppingCriteria, StoppingCriteriaList

from deltadecode.engines.transformers import DeltaCache
from deltadecode.errors import CalibrationError
from deltadecode.lab.generation import end_ids, pad_id, pad_left
from deltadecode.lab.policies.base import Floats, Layout, View
from deltadecode.lab.policies.masked import LayerAttention, MaskedPolicy
from deltadecode.lab.policies.pages import page_sums

# A prime: with a divisor or a multiple of the page size, or of the length of a line, every step
# that is looked at would stand at the same place of its page, or of its line.
STRIDE = 7
# Alone, a text needs no padding, which makes its prefill twice as fast on a CPU.
BATCH = 1
NEW_TOKENS = 192
# Told the share of the work that is done, and the seconds left (None: not known yet).
Progress = Callable[[float, "float | None"], None]


@dataclass(frozen=True)
class Prompt:
    """One text to generate from."""

    number: int  # place among all texts of a run; rows of a batch are told apart by it
    ids: list[int]  # at least two


@dataclass(eq=False)
class LayerStep:
    """What full attention does in one layer at one decode step, for all rows of a batch.

    ``place`` is among the full-attention layers, ``layer`` the model's own number. ``problems`` [B]
    int64 is :attr:`Prompt.number` of each row. ``active`` [B] is False where a row has ended.
    ``probabilities`` [B, Hq, slots] float32 is α, the softmax over all tokens (docs/semantics.md,
    R2), 0 in the padding; with learned sinks a head's sum is less than 1. ``page_scores`` [B, N]
    float32 is S_u by a row's own pages, ``page_mass`` [B, N] float32 m(u), the mean over the query
    heads of α, summed over the page. ``value`` is the cache's [B, Hkv, slots, D].
    """

    step: int
    place: int
    layer: int
    last: bool
    problems: Tensor
    active: Tensor
    view: View
    probabilities: Tensor
    page_scores: Tensor
    page_mass: Tensor
    value: Tensor

    def tokens(self, row: int) -> Tensor:
        """α of one row, [Hq, n] float32, its own tokens only."""
        return self.probabilities[row, :, int(self.view.start[row]) :]


class LayerObserver(Protocol):
    """Sees every observed step, and keeps of it what it needs."""

    def observe_layer(self, seen: LayerStep) -> None:
        """Look at one layer; layers come in ascending order, step after step.

        Tensors that are kept must not be changed.
        """


@dataclass(eq=False)
class Batch:
    """What a batch has come to when its generation is over.

    ``ids``, ``mask`` (0 in the padding on the left) and ``ended`` (after a row's end) are
    [B, slots]. The cache, which may be cut or overwritten, lacks the last token.
    """

    problems: Tensor  # [B] int64, Prompt.number of each row
    ids: Tensor
    mask: Tensor
    ended: Tensor
    width: int  # slots of the prompts
    cache: DeltaCache


@runtime_checkable
class BatchObserver(LayerObserver, Protocol):
    """Looks at whole batches too."""

    def end_batch(self, batch: Batch) -> None:
        """Look at a batch when its generation is over."""


class Observed(MaskedPolicy):
    """Full attention that shows the steps 0, stride, 2 · stride, ... to observers."""

    name = "observed"

    def __init__(
        self,
        layout: Layout,
        observers: Sequence[LayerObserver],
        page_size: int,
        stride: int = STRIDE,
    ) -> None:
        super().__init__(layout, 1)
        self.observers, self.page_size, self.stride = tuple(observers), page_size, stride
        self.problems = self.active = torch.zeros(0)

    def begin_batch(self, problems: Tensor) -> None:
        """Name the rows of the next ``generate`` call, [B] int64; all of them are active."""
        self.problems, self.active = problems, torch.ones_like(problems, dtype=torch.bool)

    def select(self, layer: int, attention: LayerAttention, view: View) -> None:
        """Everything is read."""

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """All tokens; see :meth:`Policy.expected`."""
        del prompt
        return lengths

    def attend(self, layer: int, attention: LayerAttention, value: Tensor, view: View) -> Tensor:
        """Full attention [B, Hq, D]; at an observed step its weights are shown before they go."""
        if view.step % self.stride:
            return _unseen(attention, value, view)
        weights = attention.weights
        self._show(layer, weights.flatten(1, 2), value, view)
        return (weights.to(value.dtype) @ value).flatten(1, 2)

    def _show(self, layer: int, weights: Tensor, value: Tensor, view: View) -> None:
        seen = LayerStep(
            step=view.step,
            place=layer,
            layer=self.layout.layers[layer],
            last=layer == len(self.layout.layers) - 1,
            problems=self.problems,
            active=self.active,
            view=view,
            probabilities=weights,
            page_scores=page_sums(weights.amax(dim=1), view, self.page_size),
            page_mass=page_sums(weights.mean(dim=1), view, self.page_size),
            value=value,
        )
        for observer in self.observers:
            observer.observe_layer(seen)


def observe(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    observers: Sequence[LayerObserver],
    *,
    page_size: int,
    new_tokens: int = NEW_TOKENS,
    stride: int = STRIDE,
    batch: int = BATCH,
    progress: Progress = lambda done, left: None,
) -> None:
    """Continue prompts greedily with full attention, and show observers every ``stride``-th step.

    Prompts go longest last, so that rows of a batch need little padding. Memory beside the model,
    its KV cache and prefill: the weights of one layer and step, a few times batch · Hq · n · 4
    bytes, and what the observers keep. No map of queries by keys is made. Raises CalibrationError
    when there is nothing to observe.
    """
    if not prompts:
        raise CalibrationError("there are no prompts to observe")
    if min(new_tokens - 1, stride, batch, page_size) < 1:
        raise CalibrationError(
            f"new tokens must be at least 2, stride, batch and page size at least 1, got "
            f"{new_tokens}, {stride}, {batch} and {page_size}"
        )
    policy = Observed(Layout.of(model), observers, page_size, stride)
    ordered = sorted(prompts, key=lambda prompt: (len(prompt.ids), prompt.number))
    looks_back = any(isinstance(observer, BatchObserver) for observer in observers)
    lengths = [len(prompt.ids) for prompt in ordered]
    clock = _Clock(lengths, new_tokens, batch, progress, looks_back)
    with policy.decoding(model), torch.inference_mode():
        for first in range(0, len(ordered), batch):
            _generate(model, tokenizer, policy, ordered[first : first + batch], new_tokens, clock)
            clock.end_batch()


def _generate(
    model: Any,
    tokenizer: Any,
    policy: Observed,
    rows: Sequence[Prompt],
    new_tokens: int,
    clock: _Clock,
) -> None:
    pad = pad_id(tokenizer)
    ids, mask = pad_left([prompt.ids for prompt in rows], pad, model.device)
    policy.begin_batch(torch.tensor([prompt.number for prompt in rows], device=model.device))
    ends = torch.tensor(sorted(end_ids(model, tokenizer)), device=model.device)
    watch = _Ends(policy, ends, clock)
    cache = DeltaCache(model.config)
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        past_key_values=cache,
        stopping_criteria=StoppingCriteriaList([watch]),
    )
    width = ids.shape[1]
    is_end = torch.isin(output, watch.ends)
    is_end[:, :width] = False  # a prompt may hold such tokens
    batch = Batch(
        policy.problems,
        output,
        torch.nn.functional.pad(mask, (0, output.shape[1] - width), value=1),
        is_end.cumsum(dim=1) > 0,
        width,
        cache,
    )
    for observer in policy.observers:
        if isinstance(observer, BatchObserver):
            observer.end_batch(batch)


class _Ends(StoppingCriteria):
    """Stops nothing; notes which rows have ended, and tells of every step."""

    def __init__(self, policy: Observed, ends: Tensor, clock: _Clock) -> None:
        self._policy, self.ends, self._clock = policy, ends, clock

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = torch.isin(input_ids[:, -1], self.ends)
        self._policy.active = self._policy.active & ~ended.to(self._policy.active.device)
        self._clock.step()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _Clock:
    """Work done and seconds left.

    As was seen on a CPU, 32 tokens of a prompt take about as long as a decode step, and a look back
    at a whole batch as half of its steps.
    """

    def __init__(
        self,
        prompts: Sequence[int],
        steps: int,
        batch: int,
        progress: Progress,
        looks_back: bool,
    ) -> None:
        self._progress, self._steps, self._start = progress, steps, time.monotonic()
        widths = [max(prompts[i : i + batch]) for i in range(0, len(prompts), batch)]
        self._prefill = [width / 32 for width in widths]
        self._after = steps // 2 if looks_back else 0
        self._total = sum(self._prefill) + (steps + self._after) * len(widths)
        self._done, self._batch, self._step = 0.0, 0, 0

    def step(self) -> None:
        self._step += 1
        self._tell(self._done + self._prefill[self._batch] + self._step)

    def end_batch(self) -> None:
        self._done += self._prefill[self._batch] + self._steps + self._after
        self._batch, self._step = self._batch + 1, 0
        self._tell(self._done)

    def _tell(self, done: float) -> None:
        share, taken = done / self._total, time.monotonic() - self._start
        self._progress(share, taken / share - taken if taken > 1 else None)


def _unseen(attention: LayerAttention, value: Tensor, view: View) -> Tensor:
    """Full attention where nobody looks; [B, Hq, D]. The heads of a KV head go together."""
    scores = attention.scores
    if scores.softcap is not None or scores.sinks is not None:
        return (attention.weights.to(value.dtype) @ value).flatten(1, 2)
    rows, heads, dim = attention.query.shape
    packed = attention.query.reshape(rows, attention.key.shape[1], -1, dim)
    mask = view.exists[:, None, None] if view.padded else None
    out = scaled_dot_product_attention(packed, attention.key, value, mask, scale=scores.scale)
    return out.reshape(rows, heads, out.shape[-1])
