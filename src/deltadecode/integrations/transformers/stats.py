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
        layers = self._plan.attention_layers
        self._steps = 0
        self._attended = dict.fromkeys(layers, 0)
        self._full = dict.fromkeys(layers, 0)
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
        return sum(self._full.values())

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
            unread = self._unread.get(layer if source is None else source)
            skipped = 0 if source is None or unread is None else int(unread)
            records.append(
                LayerStats(
                    layer=layer,
                    role=self._plan.role(layer),
                    source=source,
                    attended_tokens=self._attended[layer] - skipped,
                    full_tokens=self._full[layer],
                )
            )
        return records

    def __repr__(self) -> str:
        return (
            f"DecodeStats(steps={self.steps}, attended_tokens={self.attended_tokens}, "
            f"full_tokens={self.full_tokens}, attended_fraction={self.attended_fraction:.4f})"
        )

    def add_step(self) -> None:
        """Count one decode step."""
        self._steps += 1

    def add(self, layer: int, attended: int, full: int) -> None:
        """Count what one layer reads in one decode step.

        Parameters
        ----------
        layer : int
            A planned layer.
        attended, full : int
            Tokens read, and tokens in the cache, over all rows.
        """
        self._attended[layer] += attended
        self._full[layer] += full

    def add_unread(self, source: int, tokens: Tensor) -> None:
        """Count tokens that :meth:`add` was told of but that the selection turned out to leave out.

        Parameters
        ----------
        source : int
            The Δ-layer; the tokens are subtracted from each sparse layer that it selects for.
        tokens : Tensor
            Integer scalar, left on its device: reading it now would wait for the GPU.
        """
        seen = self._unread.get(source)
        self._unread[source] = tokens if seen is None else seen + tokens
