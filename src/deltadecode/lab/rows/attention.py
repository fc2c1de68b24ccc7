"""Attention of the rows of one text: queries of one batch row, each with a mask of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from deltadecode.engines.transformers.full import blockwise_attention, full_attention
from deltadecode.lab.policies.base import Scores, View
from deltadecode.lab.policies.delta import Delta
from deltadecode.lab.policies.masked import LayerAttention, MaskedPolicy
from deltadecode.lab.policies.pages import page_mask
from deltadecode.ops import select_pages

NAME = "deltadecode_rows"
_BLOCK_BYTES = 8 * 2**20  # of weights held at a time, which a CPU's caches bear


@dataclass(eq=False)
class RowsView(View):
    """R rows of one text: row r reads slots 0 ... prompt + r, and its new token is the last.

    ``step`` is 0: no row knows the steps before its own.
    """

    one_text = True

    @cached_property
    def lengths(self) -> Tensor:
        """[R] int64, tokens n of each row, the new one included."""
        return self.prompt + 1 + torch.arange(len(self.prompt), device=self.prompt.device)

    @cached_property
    def exists(self) -> Tensor:
        """[R, slots] bool, whether a row's cache holds a slot's token."""
        return self.position < self.lengths[:, None]

    @classmethod
    def of(cls, context: int, rows: int, device: torch.device) -> RowsView:
        """The rows behind a prefix of ``context`` tokens."""
        zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        return cls(zeros, zeros + context, context + rows, 0, False)


class RowsAttention(LayerAttention):
    """Attention of the rows of one text; in memory, heads are outermost, as products give them."""

    @cached_property
    def logits(self) -> Tensor:
        """[R, Hkv, G, slots] float32; those of slots behind a row mean nothing."""
        return self._grouped[0].permute(2, 0, 1, 3)

    @cached_property
    def _grouped(self) -> Tensor:
        logits = self.scores.logits(self.query.transpose(0, 1)[None], self.key)
        return logits if self.bias is None else logits + self.bias.permute(1, 2, 0, 3)

    def weights_of(self, read: Tensor | None) -> Tensor:
        """See :meth:`LayerAttention.weights_of`."""
        exists = self.view.exists[:, None, None]
        read = exists if read is None else read & exists
        weights = self.scores.weights(self._grouped, read.permute(1, 2, 0, 3))
        return weights[0].permute(2, 0, 1, 3)


class RowsPass(ABC):
    """What the planned layers of one pass do; each is asked for in ascending order."""

    def __init__(self, view: RowsView) -> None:
        self.view = view
        self.causal = additive(view.exists)[None, None]

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        """Output [1, R, Hq, D] of the model's layer; query [1, Hq, R, D], key [1, Hkv, T, D]."""


class FullPass(RowsPass):
    """Full attention in every layer."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        """See :meth:`RowsPass.attend`."""
        del layer
        return masked_attention(query, key, value, self.causal, scores)


class PolicyPass(RowsPass):
    """A policy that is asked for a mask at every layer."""

    def __init__(self, view: RowsView, policy: MaskedPolicy) -> None:
        super().__init__(view)
        self.policy = policy
        self.reads = torch.zeros_like(view.lengths, dtype=torch.float32)  # [R], over the layers

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        """See :meth:`RowsPass.attend`."""
        view = self.view
        place = self.policy.layout.layers.index(layer)
        attention = RowsAttention(query[0].transpose(0, 1), key, scores, view)
        read = self.policy.select(place, attention, view)
        mask = self.causal
        if read is None:
            self.reads += view.lengths
        else:
            read = read & view.exists[:, None, None]
            self.reads += read.any(dim=2).sum(dim=2).float().mean(dim=1)
            tokens = read.flatten(0, 2).any(dim=0).nonzero()[:, 0]  # which any row reads
            if len(tokens) < view.slots and attention.bias is None:
                read, key, value = read[..., tokens], key[:, :, tokens], value[:, :, tokens]
            # [R, Hkv or 1, G or 1, T] to [Hkv or 1, G or 1, R, T]
            mask = additive(read.permute(1, 2, 0, 3))
        if attention.bias is not None:
            mask = mask + attention.bias.permute(1, 2, 0, 3)
        return masked_attention(query, key, value, mask, scores)


@dataclass(frozen=True, eq=False)
class Chosen:
    """The pages of all rows: the tokens that any row reads, and which of them each row reads."""

    tokens: Tensor  # [U] int64
    mask: Tensor  # [1, 1, R, U] float32: 0, or -inf

    @classmethod
    def of(cls, page_ids: Tensor, page_size: int, view: View) -> Chosen:
        """Read it from page ids [R, K] as :func:`deltadecode.ops.select_pages` gives them."""
        count = -(-view.slots // page_size)
        pages = page_mask(page_ids, count)
        used = pages.any(dim=0).nonzero()[:, 0]
        offset = torch.arange(page_size, device=page_ids.device)
        tokens = (used[:, None] * page_size + offset).flatten()
        tokens = tokens[tokens < view.slots]
        read = pages[:, used].repeat_interleave(page_size, dim=1)[:, : len(tokens)]
        read = read & (tokens < view.lengths[:, None])
        return cls(tokens, additive(read)[None, None])


class DeltaPass(RowsPass):
    """DELTA: full layers read everything, sparse layers the pages of their Δ-layer.

    ``known`` holds page scores [R, N] of Δ-layers that need not run: of those before the first
    layer of a pass.
    """

    def __init__(self, view: RowsView, policy: Delta, known: dict[int, Tensor]) -> None:
        super().__init__(view)
        self.cfg, self.plan = policy.cfg, policy.plan
        self.page_scores = known
        self._chosen: dict[int, Chosen] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        """See :meth:`RowsPass.attend`."""
        source = self.plan.source(layer)
        if source is not None:
            chosen = self._pages(source)
            key, value = (states.index_select(2, chosen.tokens) for states in (key, value))
            return masked_attention(query, key, value, chosen.mask, scores)
        if layer in self.plan.sources:
            self.page_scores[layer] = page_scores(query, key, scores, self.view, self.cfg.page_size)
        return masked_attention(query, key, value, self.causal, scores)

    def _pages(self, source: int) -> Chosen:
        if source not in self._chosen:
            ids, _ = select_pages(self.page_scores[source], self.view.lengths.int(), self.cfg)
            self._chosen[source] = Chosen.of(ids, self.cfg.page_size, self.view)
        return self._chosen[source]


def page_scores(query: Tensor, key: Tensor, scores: Scores, view: View, page_size: int) -> Tensor:
    """S_u of every row (docs/semantics.md, R2), [R, N] float32; query [1, Hq, R, D].

    Some rows at a time, so that the weights of all heads stay in the processor's cache.
    """
    heads, rows = query.shape[1:3]
    size = max(1, _BLOCK_BYTES // (4 * heads * view.slots))
    beyond = -view.slots % page_size
    parts = []
    for first in range(0, rows, size):
        part = slice(first, first + size)
        weights = scores.weights(scores.logits(query[:, :, part], key), view.exists[part])
        largest = weights.amax(dim=(1, 2))[0]
        parts.append(pad(largest, (0, beyond)).unflatten(1, (-1, page_size)).sum(dim=2))
    return torch.cat(parts)


def additive(read: Tensor) -> Tensor:
    """A boolean mask as numbers to add to logits: 0, or -inf; float32."""
    zero = torch.zeros((), device=read.device)
    return zero.where(read, -torch.inf)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scores: Scores
) -> Tensor:
    """Attention of R queries over keys that all of them share; [1, R, Hq, D].

    Query [1, Hq, R, D], key and value [1, Hkv, T, D]. The additive mask is [1, 1, R, T], or
    [Hkv or 1, G or 1, R, T].
    """
    _, heads, rows, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    if scores.sinks is not None or scores.softcap is not None:
        whole = mask.expand(kv_heads, group, *mask.shape[2:]).reshape(1, heads, *mask.shape[2:])
        return blockwise_attention(
            query, key, value, whole, scale=scores.scale, causal=False,
            sinks=scores.sinks, softcap=scores.softcap,
        )  # fmt: skip
    # The heads of a group are the rows of a batch, so that no key is copied for each of them.
    packed = query.view(kv_heads, group, rows, dim).transpose(0, 1)
    key, value = (states.expand(group, -1, -1, -1) for states in (key, value))
    mask = mask.to(query.dtype).transpose(0, 1)
    out = scaled_dot_product_attention(packed, key, value, mask, scale=scores.scale)
    # [G, Hkv, R, D] to [1, R, Hkv, G, D]
    return out.permute(2, 1, 0, 3).reshape(1, rows, heads, out.shape[3])


def rows_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of Transformers' interface: what the pass in progress says.

    Prefill and layers that are not planned are full attention under the model's own mask.
    """
    holder: Holder | None = getattr(module, NAME, None)
    if holder is None or holder.current is None:
        out = full_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    scores = Scores.of(query.shape[3], scaling, kwargs)
    layer: Any = module.layer_idx
    return holder.current.attend(layer, query, key, value, scores), None


class Holder:
    """Hangs on the planned modules; None is prefill."""

    current: RowsPass | None = None


AttentionInterface.register(NAME, rows_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
