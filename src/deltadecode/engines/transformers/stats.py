"""What decoding has read: tokens attended to, beside those of full attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltadecode.config import LayerPlan
from deltadecode.engines.transformers.offload_stats import OffloadStats


@dataclass(frozen=True)
class LayerStats:
    """Counts of one planned layer.

    Attributes
    ----------
    layer : int
        Layer number, as the model counts.
    role : str
        ``"dense"``, ``"delta"`` or ``"sparse"``.
    source : int or None
        Δ-layer that selects the pages of a sparse layer.
    attended_tokens, full_tokens : int
        Tokens read in all decode steps, and tokens that full attention would have read. The rows
        of a batch count one by one.
    """

    layer: int
    role: str
    source: int | None
    attended_tokens: int
    full_tokens: int


class DecodeStats:
    """Counts over all decode steps of a model since it was enabled, or since :meth:`reset`.

    The object is live: it goes on counting as the model decodes, and keeps its last numbers after
    :func:`deltadecode.disable`. A decode step is a forward pass of one new token per row after the
    prompt; prefill, also by chunks, is not counted. In lossless mode drafts and verifications are
    steps (docs/semantics.md, R11).

    Attributes
    ----------
    drafted, verified, accepted : int
        Drafts of lossless mode, over all rows: made, compared with full attention, and kept.
    offload : OffloadStats
        What a cache of sparse layers on the host holds and fetches.
    """

    def __init__(self, plan: LayerPlan, lossless: bool = False) -> None:
        self._plan, self._lossless = plan, lossless
        # Layer -> what compiled steps have counted, which no Python number could.
        self._on_device: dict[int, Tensor] = {}
        self.offload = OffloadStats()
        self.reset()

    def reset(self) -> None:
        """Set every count to zero."""
        self._steps = 0
        self.drafted = self.verified = self.accepted = 0
        self.offload.reset()
        # All full layers read the same, and so do all sparse ones, but for what they leave out.
        self._full = 0
        self._sparse = 0
        self._unread: dict[int, Tensor] = {}
        for counts in self._on_device.values():
            counts.zero_()  # in place: graphs go on counting in the same memory

    @property
    def steps(self) -> int:
        """Decode steps; one step advances all rows of a batch by one token."""
        return self._steps + self._sum(0)

    @property
    def attended_tokens(self) -> int:
        """Tokens read by all planned layers in all decode steps."""
        return sum(layer.attended_tokens for layer in self.per_layer)

    @property
    def full_tokens(self) -> int:
        """Tokens that full attention would have read in the same layers and steps."""
        return (self._full + self._sum(1)) * len(self._plan.attention_layers)

    @property
    def attended_fraction(self) -> float:
        """``attended_tokens / full_tokens``; 1.0 before the first decode step."""
        full = self.full_tokens
        return self.attended_tokens / full if full else 1.0

    @property
    def acceptance(self) -> float:
        """``accepted / verified``; 1.0 before the first draft was verified."""
        return self.accepted / self.verified if self.verified else 1.0

    @property
    def per_layer(self) -> list[LayerStats]:
        """Counts of each planned layer, ascending."""
        records = []
        full = self._full + self._sum(1)
        counted = {layer: int(counts[2]) for layer, counts in self._on_device.items()}
        for layer in self._plan.attention_layers:
            source = None if self._lossless else self._plan.source(layer)
            attended = full
            if self._lossless:
                attended = self._sparse - sum(int(tokens) for tokens in self._unread.values())
            if source is not None:
                attended = self._sparse - int(self._unread.get(source, 0)) + counted.get(source, 0)
            records.append(
                LayerStats(
                    layer=layer,
                    role="delta" if self._lossless else self._plan.role(layer),
                    source=source,
                    attended_tokens=attended,
                    full_tokens=full,
                )
            )
        return records

    def __repr__(self) -> str:
        return (
            f"DecodeStats(steps={self.steps}, attended_tokens={self.attended_tokens}, "
            f"full_tokens={self.full_tokens}, attended_fraction={self.attended_fraction:.4f})"
        )

    def add_step(self, full: int, sparse: int) -> None:
        """Count one decode step: tokens that a full and a sparse layer read, over all rows."""
        self._steps += 1
        self._full += full
        self._sparse += sparse

    def add_read(self, tokens: int) -> None:
        """Count one pass of lossless decoding: tokens that each layer reads, over all rows."""
        self._steps += 1
        self._sparse += tokens

    def add_full(self, tokens: int) -> None:
        """Count what full attention would have read in a layer for tokens that were decided."""
        self._full += tokens

    def add_drafts(self, drafted: int, verified: int, accepted: int) -> None:
        """Count the drafts of one verification, over all rows."""
        self.drafted += drafted
        self.verified += verified
        self.accepted += accepted

    def add_unread(self, source: int, tokens: Tensor) -> None:
        """Take back tokens that :meth:`add_step` counted for the sparse layers of a Δ-layer.

        ``tokens`` is an integer scalar, left on its device: reading it would wait for the GPU.
        """
        seen = self._unread.get(source)
        self._unread[source] = tokens if seen is None else seen + tokens

    def device_counts(self, layer: int, device: torch.device) -> Tensor:
        """Counts that steps from a static cache add to, where the layer's keys are.

        Returns
        -------
        Tensor
            [3] int64: decode steps and tokens of full attention, added up by the first planned
            layer, and tokens that each sparse layer of a Δ-layer has read.
        """
        counts = self._on_device.get(layer)
        if counts is None or counts.device != device:
            if torch.compiler.is_compiling():
                fresh = torch.zeros(3, dtype=torch.int64, device=device)
            else:
                # Steps outside of inference mode must be able to add to them, too.
                with torch.inference_mode(False):
                    fresh = torch.zeros(3, dtype=torch.int64, device=device)
                # CUDA graphs write to tensors that never move, and to no others.
                torch._dynamo.mark_static_address(fresh)
            if counts is not None:  # the model has moved
                fresh.copy_(counts)
            counts = self._on_device[layer] = fresh
        return counts

    def _sum(self, place: int) -> int:
        return sum(int(counts[place]) for counts in self._on_device.values())
