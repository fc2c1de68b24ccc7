"""How much each layer needs what it attends to far away: the layer alone goes without it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from deltadecode.engines.transformers import DeltaCache
from deltadecode.engines.transformers.cache import DeltaLayer
from deltadecode.engines.transformers.full import full_attention
from deltadecode.engines.transformers.swap import attending
from deltadecode.lab.observe import Batch, LayerStep

NAME = "deltadecode_limited"
TOKENS = 32


class Need:
    """w_j: how far the logits move when layer j alone reads recent and sink pages only.

    When a batch has been generated, its last tokens (at most ``tokens`` of a text) go through the
    model again in one piece, from the cache of what was before them, once with full attention and
    once for each layer j with that layer limited. With z the centred logits of a token, w_j is the
    mean of ‖z_j - z‖ ÷ ‖z‖ over tokens. Captured mass alone does not say this: a layer may attend
    far away to no effect.

    Memory: the logits of ``batch · tokens`` tokens three times over, and sums of problems · layers.
    A model with sliding-window or recurrent layers, whose caches cannot be cut, prefills each text
    once more and holds its cache twice.
    """

    def __init__(
        self, model: Any, problems: int, layers: Sequence[int], page_size: int,
        recent_pages: int, sink_pages: int, tokens: int = TOKENS,
    ) -> None:  # fmt: skip
        self._model, self._layers, self._tokens = model, tuple(layers), tokens
        # A query always sees its own page, even where L = 0.
        self._page_size, self._recent, self._sink = page_size, max(recent_pages, 1), sink_pages
        self._sums = torch.zeros(problems, len(layers), dtype=torch.float64)
        self._counts = torch.zeros(problems, dtype=torch.float64)

    def observe_layer(self, seen: LayerStep) -> None:
        """Nothing is kept of single steps."""

    def end_batch(self, batch: Batch) -> None:
        """Measure the last tokens of a batch; see :class:`Need`."""
        total = batch.cache.get_seq_length()
        first = max(batch.width, total - self._tokens)
        used = ~batch.ended[:, first:total]
        if total - first < 2 or not bool(used.any()):
            return
        limit = self._visible(batch, first, total)
        with attending(self._model, NAME, _Run()) as run:
            logits = self._forward(batch, first, total)
            full = logits()
            size = torch.linalg.vector_norm(full, dim=2)
            rows = batch.problems.cpu()
            for place, layer in enumerate(self._layers):
                run.layer, run.mask = layer, limit
                moved = torch.linalg.vector_norm(logits() - full, dim=2) / size
                self._sums[rows, place] += (moved * used.to(moved.device)).sum(dim=1).double().cpu()
                run.layer = None
        self._counts[rows] += used.sum(dim=1).double().cpu()

    def _visible(self, batch: Batch, first: int, total: int) -> Tensor:
        """[B, 1, tokens, total] bool: what a limited layer reads."""
        slot = torch.arange(total, device=batch.mask.device)
        position = slot - (batch.mask[:, :total] == 0).sum(dim=1, keepdim=True)
        key, query = position[:, None, :], position[:, first:, None]
        page, own = key // self._page_size, query // self._page_size
        near = (own - page < self._recent) | (page < self._sink)
        return ((key >= 0) & (key <= query) & near)[:, None]

    def _forward(self, batch: Batch, first: int, total: int) -> Callable[[], Tensor]:
        """A function that gives the centred logits [B, tokens, vocabulary] anew at each call."""
        mask = batch.mask[:, :total]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache, can_cut = batch.cache, _can_cut(batch.cache)
        if not can_cut:
            cache = DeltaCache(self._model.config)
            self._model(
                batch.ids[:, :first], attention_mask=mask[:, :first],
                position_ids=positions[:, :first], past_key_values=cache, logits_to_keep=1,
            )  # fmt: skip

        def logits() -> Tensor:
            if can_cut:
                cache.crop(first - total)  # negative: so many tokens less
            out: Tensor = self._model(
                batch.ids[:, first:total], attention_mask=mask,
                position_ids=positions[:, first:],
                past_key_values=cache if can_cut else copy.deepcopy(cache),
            ).logits.float()  # fmt: skip
            return out - out.mean(dim=2, keepdim=True)

        return logits

    def weights(self, problems: Sequence[int] | None = None) -> NDArray[np.float64]:
        """The weights w, [layers], over some texts (default: all), each token weighing the same."""
        rows = slice(None) if problems is None else list(problems)
        count = self._counts[rows].sum().clamp(min=1)
        weights: NDArray[np.float64] = (self._sums[rows].sum(dim=0) / count).numpy()
        return weights


class _Run:
    """Which layer is limited now, and to what; all others attend fully."""

    layer: int | None = None
    mask: Tensor | None = None


def limited_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention function of Transformers' interface: full, or limited in the layer of a run."""
    run: _Run | None = getattr(module, NAME, None)
    if run is not None and run.layer == module.layer_idx:
        assert run.mask is not None
        attention_mask = run.mask.to(query.device)
    out = full_attention(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return out, None


AttentionInterface.register(NAME, limited_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _can_cut(cache: Any) -> bool:
    return all(type(layer) in (DynamicLayer, DeltaLayer) for layer in cache.layers)
