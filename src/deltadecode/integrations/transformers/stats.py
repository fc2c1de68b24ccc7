"""What decoding has read: tokens attended to, beside those of full attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from deltadecode.config import LayerPlan


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
    prompt; prefill, also by chunks, is not counted.

    Parameters
    ----------
    plan : LayerPlan
        Plan of the model.
    """

    def __init__(self, plan: LayerPlan) -> None:
        self._plan = plan
        self.reset()

    def reset(self) -> None:
        """Set every count to zero."""
        self._steps = 0
        # All full layers read the same, and so do all sparse ones, but for what they leave out.
        self._full = 0
        self._sparse = 0
        self._unread: dict[int, Tensor] = {}

    @property
    def steps(self) -> int:
        """Decode steps; one step advances all rows of a batch by one token."""
        return self._steps

    @property
    def attended_tokens(self) -> int:
        """Tokens read by all planned layers in all decode steps."""
        return sum(layer.attended_tokens for layer in self.per_layer)

    @property
    def full_tokens(self) -> int:
        """Tokens that full attention would have read in the same layers and steps."""
        return self._full * len(self._plan.attention_layers)

    @property
    def attended_fraction(self) -> float:
        """``attended_tokens / full_tokens``; 1.0 before the first decode step."""
        full = self.full_tokens
        return self.attended_tokens / full if full else 1.0

    @property
    def per_layer(self) -> list[LayerStats]:
        """Counts of each planned layer, ascending."""
        records = []
        for layer in self._plan.attention_layers:
            source = self._plan.source(layer)
            attended = self._full
            if source is not None:
                attended = self._sparse - int(self._unread.get(source, 0))
            records.append(
                LayerStats(
                    layer=layer,
                    role=self._plan.role(layer),
                    source=source,
                    attended_tokens=attended,
                    full_tokens=self._full,
                )
            )
        return records

    def __repr__(self) -> str:
        return (
            f"DecodeStats(steps={self.steps}, attended_tokens={self.attended_tokens}, "
            f"full_tokens={self.full_tokens}, attended_fraction={self.attended_fraction:.4f})"
        )

    def add_step(self, full: int, sparse: int) -> None:
        """Count one decode step.

        Parameters
        ----------
        full, sparse : int
            Tokens that a full and a sparse layer read, over all rows.
        """
        self._steps += 1
        self._full += full
        self._sparse += sparse

    def add_unread(self, source: int, tokens: Tensor) -> None:
        """Count tokens that :meth:`add_step` was told of but that were not on the selected pages.

        Parameters
        ----------
        source : int
            The Δ-layer; the tokens are subtracted from each sparse layer that it selects for.
        tokens : Tensor
            Integer scalar, left on its device: reading it now would wait for the GPU.
        """
        seen = self._unread.get(source)
        self._unread[source] = tokens if seen is None else seen + tokens
