"""The protocol of all policies: which tokens of its cache a model reads at a decode step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltadecode.architecture import attention_layers, kv_heads, text_config
from deltadecode.errors import PolicyError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """What a policy needs to know of a model: its full-attention layers, and their heads."""

    layers: tuple[int, ...]  # ascending; other layers keep their own attention
    query_heads: int
    kv_heads: int

    @classmethod
    def of(cls, model: Any) -> Layout:
        """Read them from a Hugging Face model or configuration."""
        config = text_config(model)
        heads = int(config.num_attention_heads)
        return cls(tuple(attention_layers(model)), heads, kv_heads(config) or heads)


@dataclass(frozen=True)
class Scores:
    """How a model turns queries and keys into logits (docs/semantics.md, R7)."""

    scale: float  # factor on q · k
    softcap: float | None = None  # logits become softcap * tanh(logit / softcap)
    sinks: Tensor | None = None  # [Hq], one more logit in each softmax denominator

    @classmethod
    def of(cls, dim: int, scaling: float | None, kwargs: Mapping[str, Any]) -> Scores:
        """Read them from what a model passes to its attention function, for heads of size D."""
        scale = dim**-0.5 if scaling is None else scaling
        return cls(scale, kwargs.get("softcap"), kwargs.get("s_aux"))

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        """Logits of each query head over its KV head's keys.

        From query [B, Hq, Q, D] and key [B, Hkv, T, D] to [B, Hkv, G, Q, T] with G = Hq / Hkv;
        float32, float64 for float64 input. One row of keys may serve all rows of queries.
        """
        rows, heads, queries, dim = query.shape
        if key.shape[0] < rows:
            shared = query.permute(1, 2, 0, 3).reshape(1, heads, queries * rows, dim)
            per_query: Tensor = self.logits(shared, key).unflatten(3, (queries, rows))
            return per_query[0].permute(3, 0, 1, 2, 4)
        kv_heads, tokens = key.shape[1:3]
        packed = query.reshape(rows, kv_heads, heads // kv_heads * queries, dim)
        dtype = torch.promote_types(query.dtype, torch.float32)
        logits = (packed @ key.transpose(2, 3)).to(dtype).mul_(self.scale)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits.view(rows, kv_heads, heads // kv_heads, queries, tokens)

    def weights(self, logits: Tensor, read: Tensor) -> Tensor:
        """Softmax of logits [B, Hkv, G, Q, T] over the tokens that the mask ``read`` lets through.

        A query that reads nothing gets weights of 0; with sinks, weights sum to less than 1.
        """
        logits = logits.masked_fill(~read, -torch.inf)
        tokens = logits.shape[-1]
        if self.sinks is not None:
            sink = self.sinks.to(logits.dtype).view(1, *logits.shape[1:3], 1, 1)
            logits = torch.cat([logits, sink.expand(*logits.shape[:-1], 1)], dim=-1)
        weights: Tensor = torch.softmax(logits, dim=-1)[..., :tokens]
        return weights.masked_fill_(~read, 0.0)  # also what is NaN where nothing is read


@dataclass(eq=False)
class View:
    """The rows of a batch at one forward pass: left-padded, the new token last.

    Or the rows of one text (``one_text``), which all read the same slots, each up to its own
    length: then keys and values have a batch of 1.
    """

    one_text: ClassVar[bool] = False
    start: Tensor  # [B] int64, slot of each row's first token
    prompt: Tensor  # [B] int64, tokens of each row's prompt
    slots: int  # of the cache, the new token's included
    step: int  # number of the decode step, from 0; -1 for the prompt
    padded: bool  # whether any row has padding

    @cached_property
    def position(self) -> Tensor:
        """[B, slots] int64, each slot's token number in its row; negative in the padding."""
        return torch.arange(self.slots, device=self.start.device) - self.start[:, None]

    @cached_property
    def exists(self) -> Tensor:
        """[B, slots] bool, whether a slot holds a token."""
        return self.position >= 0

    @cached_property
    def lengths(self) -> Tensor:
        """[B] int64, tokens n of each row, the new one included."""
        return self.slots - self.start


@dataclass(frozen=True)
class Counts:
    """What decoding read and kept, averaged over the full-attention layers; all [steps, B] float64.

    ``read`` are the tokens whose keys and values a step reads. Where the query heads of a KV head
    read different tokens, those that any of them reads; the mean over KV heads. ``kept`` are the
    tokens whose keys and values stay in memory at that step. ``metadata`` is what a policy reads
    besides, in tokens: two vectors of the size of a head count as one token's key and value.
    """

    read: Floats
    kept: Floats
    metadata: Floats


class Policy(ABC):
    """One way to decode from a cache; PolicyError when it cannot keep to the budget.

    The budget is in tokens that a sparse layer may read at a step, the new one included.
    """

    name: ClassVar[str]
    # Whether a step reads what earlier steps left behind. Otherwise many rows of a text can be
    # evaluated in one forward pass (deltadecode.lab.rows).
    history: bool = False

    def __init__(self, layout: Layout, budget: int) -> None:
        self.layout = layout
        self.budget = budget

    @abstractmethod
    def decoding(self, model: Any) -> AbstractContextManager[None]:
        """While it lasts, ``model.generate`` decodes with this policy."""

    @abstractmethod
    def counts(self, prompts: Sequence[int], steps: int) -> Counts:
        """What the first ``steps`` decode steps of the last ``generate`` call read and kept.

        ``prompts`` are the tokens of each row's prompt.
        """

    @abstractmethod
    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """Tokens that a step reads, averaged over layers, as far as they are known before.

        ``lengths`` are the tokens n in the cache at each step, the new one included. An upper bound
        where it depends on the data.
        """

    def overhead(self, lengths: Floats) -> Floats:
        """Other reads of a step in tokens, averaged over layers; see :attr:`Counts.metadata`."""
        return np.zeros_like(lengths)

    def check(self, longest_prompt: int) -> None:
        """Refuse prompts, in tokens, that leave no room in the budget, with PolicyError."""
        del longest_prompt

    def _refuse(self, rule: str) -> PolicyError:
        return PolicyError(f"policy {self.name!r} cannot keep to {self.budget} tokens: {rule}")


def pages_of(policy: Policy, budget: int, page_size: int, least: int) -> int:
    """Whole pages of a budget in tokens; PolicyError when there are fewer than ``least``."""
    if page_size < 1:
        raise PolicyError(f"page_size of policy {policy.name!r} must be at least 1")
    pages = budget // page_size
    if pages < least:
        raise policy._refuse(f"it needs {least} pages of {page_size} tokens, {least * page_size}")
    return pages
