"""Full attention: what every other policy is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from deltadecode.engines.transformers.swap import stock_attention
from deltadecode.lab.policies.base import Counts, Floats, Policy


class Full(Policy):
    """The model's stock attention: every layer reads every token at every step."""

    name = "full"

    @contextmanager
    def decoding(self, model: Any) -> Iterator[None]:
        """The attention that the model had before DELTA, where it is enabled."""
        with stock_attention(model):
            yield

    def counts(self, prompts: Sequence[int], steps: int) -> Counts:
        """Everything is read and kept; see :meth:`Policy.counts`."""
        lengths = np.asarray(prompts)[None] + np.arange(1.0, steps + 1)[:, None]
        return Counts(lengths, lengths, np.zeros_like(lengths))

    def expected(self, lengths: Floats, prompt: int) -> Floats:
        """All tokens; see :meth:`Policy.expected`."""
        del prompt
        return lengths
