"""Policies in plain PyTorch: every step computes all logits, and a mask says what is read.

What is masked cannot reach an output, so the results are those of kernels that read no more. Where
a policy evicts, the tokens stay in the cache but are masked for good. Prefill is full attention.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from deltadecode.engines.transformers.full import full_attention
from deltadecode.engines.transformers.swap import attending
from deltadecode.errors import PolicyError
from deltadecode.lab.policies.base import Counts, Layout, Policy, Scores, View
from deltadecode.lab.policies.whole_prompt import whole_prompt

NAME = "deltadecode_policy"


class LayerAttention:
    """What full attention would see at one layer of a decode step; computed when asked for.

    ``query`` is [B, Hq, D], ``key`` [B, Hkv, slots, D] with the new token's last; for the rows of
    one text [1, Hkv, slots, D]. ``bias`` is added to the logits, [B, Hkv, G, slots] or what
    broadcasts to it: a policy that wants another softmax sets it before it looks at any weights.
    """

    bias: Tensor | None = None

    def __init__(self, query: Tensor, key: Tensor, scores: Scores, view: View) -> None:
        self.query, self.key, self.scores, self.view = query, key, scores, view

    @cached_property
    def logits(self) -> Tensor:
        """[B, Hkv, G, slots] float32; those of padding mean nothing."""
        logits = self.scores.logits(self.query[:, :, None], self.key)[:, :, :, 0]
        return logits if self.bias is None else logits + self.bias

    @cached_property
    def weights(self) -> Tensor:
        """[B, Hkv, G, slots] float32, the softmax over all tokens of a row."""
        return self.weights_of(None)

    def weights_of(self, read: Tensor | None) -> Tensor:
        """The softmax over the tokens that a mask lets through (None: all), 0 elsewhere.

        The mask broadcasts to [B, Hkv, G, slots].
        """
        exists = self.view.exists[:, None, None]
        read = exists if read is None else read & exists
        return self.scores.weights(self.logits[:, :, :, None], read[:, :, :, None])[:, :, :, 0]


class MaskedPolicy(Policy):
    """A policy that is asked for a mask at each layer of a decode step.

    A new ``generate`` call starts anew: :meth:`prefill` sees the whole prompt of each layer.
    """

    evicts: ClassVar[bool] = False  # whether what is not read is gone for good

    def __init__(self, layout: Layout, budget: int) -> None:
        super().__init__(layout, budget)
        self._view: View | None = None
        self._log: list[Tensor] = []

    def prefill(self, layer: int, query: Tensor, key: Tensor, scores: Scores, view: View) -> None:
        """See the prompt of one layer, after its attention; by default nothing is done with it.

        ``layer`` is a place among the full-attention layers. query [B, Hq, T, D], key
        [B, Hkv, T, D].
        """

    @abstractmethod
    def select(self, layer: int, attention: LayerAttention, view: View) -> Tensor | None:
        """Choose what a layer reads at a decode step; None: everything.

        ``layer`` is a place among the full-attention layers. The mask broadcasts to
        [B, Hkv, G, slots]; padding is left out whatever it says.
        """

    def observe(self, layer: int, weights: Tensor, view: View) -> None:
        """See the attention weights [B, Hkv, G, slots] of a decode step, as for eviction.

        Weights are 0 for what was not read; ``layer`` is a place among the full-attention layers.
        """

    @contextmanager
    def decoding(self, model: Any) -> Iterator[None]:
        """While it lasts, ``model.generate`` decodes with this policy."""
        try:
            with whole_prompt(model), attending(model, NAME, self):
                yield
        finally:
            self._view = None

    def counts(self, prompts: Sequence[int], steps: int) -> Counts:
        """What the last ``generate`` call read and kept; see :meth:`Policy.counts`."""
        if not self._log:
            none = np.zeros((0, len(prompts)))
            return Counts(none, none, none)
        read = torch.stack(self._log[:steps]).double().cpu().numpy() / len(self.layout.layers)
        lengths = np.asarray(prompts)[None] + np.arange(1.0, len(read) + 1)[:, None]
        return Counts(read, read if self.evicts else lengths, self.overhead(lengths))

    def note_rows(self, reads: Tensor) -> None:
        """Let :meth:`counts` tell of the rows of one text; reads [R], summed over the layers."""
        self._log = list(reads[:, None])

    def begin_prompt(self, layer: int, key: Tensor, queries: int, mask: Tensor | None) -> View:
        """The rows at the prompt; found out once, at the first layer."""
        rows, _, slots, _ = key.shape
        if queries != slots:
            raise PolicyError(
                f"policy {self.name!r} takes a prompt in one piece and no cache from before, got "
                f"{queries} new tokens behind {slots - queries}"
            )
        if layer and self._view is not None:
            return self._view
        start = torch.zeros(rows, dtype=torch.int64, device=key.device)
        padded = False
        if mask is not None:
            valid = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, -1].expand(rows, slots)
            start = valid.int().argmax(dim=1)
            if bool((valid.sum(dim=1) != slots - start).any()):
                raise PolicyError(f"policy {self.name!r} takes padding on the left only")
            padded = bool((start > 0).any())
        self._log = []
        self._view = View(start, slots - start, slots, -1, padded)
        return self._view

    def begin_step(self, layer: int, slots: int) -> View:
        """The rows at a decode step; a new view at the first layer."""
        view = self._view
        if view is None:
            raise PolicyError(f"policy {self.name!r} takes no cache from before")
        if layer and (view.step < 0 or view.slots != slots):
            raise PolicyError(
                f"policy {self.name!r} cannot follow a model whose layers see different tokens: "
                f"layer {self.layout.layers[layer]} sees one of {slots}"
            )
        if layer == 0:
            self._view = view = View(view.start, view.prompt, slots, view.step + 1, view.padded)
            self._log.append(torch.zeros_like(view.lengths, dtype=torch.float32))
        return view

    def attend(self, layer: int, attention: LayerAttention, value: Tensor, view: View) -> Tensor:
        """Attend with one query per row: select, count what is read, observe; gives [B, Hq, D]."""
        read = self.select(layer, attention, view)
        if read is None:
            weights = attention.weights
            self._log[-1] += view.lengths
        else:
            read = read & view.exists[:, None, None]
            weights = attention.weights_of(read)
            any_head = read.any(dim=2)  # of those that share keys and values
            self._log[-1] += any_head.sum(dim=2).float().mean(dim=1)
        out = weights.to(value.dtype) @ value
        self.observe(layer, weights, view)
        return out.flatten(1, 2)


def policy_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of Transformers' interface: what the module's policy says.

    ``kwargs`` may hold ``s_aux`` (learned sinks) and ``softcap``; output [B, Q, Hq, D].
    """
    policy: MaskedPolicy | None = getattr(module, NAME, None)
    if policy is None:
        return full_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        ), None
    layer = policy.layout.layers.index(module.layer_idx)
    scores = Scores.of(query.shape[3], scaling, kwargs)
    if query.shape[2] == 1 and key.shape[2] > 1:
        view = policy.begin_step(layer, key.shape[2])
        attention = LayerAttention(query[:, :, 0], key, scores, view)
        return policy.attend(layer, attention, value, view)[:, None], None
    out = full_attention(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    view = policy.begin_prompt(layer, key, query.shape[2], attention_mask)
    policy.prefill(layer, query, key, scores, view)
    return out, None


AttentionInterface.register(NAME, policy_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
