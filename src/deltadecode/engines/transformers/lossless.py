"""Lossless decoding: drafts by sparse layers, verified by full attention (docs/semantics.md, R12).

Every planned layer drafts from pages of its own, which it selected at the last verification.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import PreTrainedModel

from deltadecode.engines.transformers.cache import DeltaCache, DeltaLayer
from deltadecode.engines.transformers.rows import RowGroup
from deltadecode.engines.transformers.step import Rows
from deltadecode.errors import ArgumentError, ArgumentTypeError, UnsupportedModelError
from deltadecode.ops import decode_attention, select_pages

if TYPE_CHECKING:
    from deltadecode.config import DeltaConfig
    from deltadecode.engines.transformers.state import ModelState

DRAFT_TOKENS = 4
_MOST_DRAFTS = 16
# Behind every page that exists.
_NO_PAGE = 2**30

# Layer -> number of the row group -> a tensor. Rows within the budget have none.
ByLayer = dict[int, dict[int, Tensor]]


class Phase(Enum):
    """What a forward pass of lossless decoding does."""

    VERIFY = "verify"
    DRAFT = "draft"


class Drafting:
    """What one call of ``generate`` carries from a verification to its drafts.

    Parameters
    ----------
    state : ModelState
        Of the model that decodes.

    Attributes
    ----------
    phase : Phase
        Of the pass in progress.
    """

    def __init__(self, state: ModelState) -> None:
        self.state = state
        self.phase = Phase.VERIFY
        self._rows: Rows | None = None
        self._groups: list[RowGroup] = []  # of the last verification
        self._scores: ByLayer = {}
        self._pages: ByLayer = {}

    @property
    def ready(self) -> bool:
        """Whether drafts would read less than full attention, from pages of every layer."""
        layers = self.state.plan.attention_layers
        return len(self._pages) == len(layers) and bool(self._pages[self.state.first])

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor | None:
        """Attention of one planned layer; None where it is full attention and selects nothing.

        Query [B, Hq, Q, D] to the output [B, Q, Hq, D]; key and value [B, Hkv, slots, D]. The mask
        is that of all Q tokens. ``options`` are those of :func:`deltadecode.ops.decode_attention`.
        """
        mask = mask if mask is None else mask[:, :, -1:]
        if layer == self.state.first:
            self._rows = Rows.of(self.state.cfg, key, mask)
            self._count(self._rows)
        if self._rows is None or self._rows.device != key.device:
            self._rows = Rows.of(self.state.cfg, key, mask)
        rows = self._rows
        if rows.every_page:
            return None
        query = query.transpose(1, 2).to(key.dtype)
        attend = self._verify if self.phase is Phase.VERIFY else self._draft
        if rows.groups[0].rows is None:
            return attend(layer, 0, rows.groups[0], query, key, value, options)
        out = torch.empty_like(query)
        for place, group in enumerate(rows.groups):
            part = query[group.rows]
            out[group.rows] = attend(layer, place, group, part, key, value, options)
        return out

    def select(self, kept: int, rejected: int) -> None:
        """Select pages for drafts, by the last of a verification's tokens that stays in the cache.

        ``kept`` tokens stay, and the ``rejected`` behind them have left it.
        """
        cfg, groups, drafts = self.state.cfg, self._groups, self.state.draft_tokens
        for group in groups:
            lengths = range(group.length - rejected - kept + 1, group.length - rejected + 1)
            self.state.stats.add_full(len(group.members) * sum(lengths))
        self._pages = {
            layer: {
                place: _held_pages(
                    scores[:, kept - 1], groups[place].length - rejected, drafts, cfg
                )
                for place, scores in by_group.items()
                if _exceeds(cfg, groups[place].length - rejected)
            }
            for layer, by_group in self._scores.items()
        }
        self._scores = {}

    def _count(self, rows: Rows) -> None:
        if self.phase is Phase.VERIFY:
            self._groups, self._scores, self._pages = rows.groups, {}, {}
            self.state.stats.add_read(rows.full_tokens)
            return
        page = self.state.cfg.page_size
        read = torch.zeros((), dtype=torch.int64)
        for place, group in enumerate(rows.groups):
            ids = self._pages.get(self.state.first, {}).get(place)
            if ids is None:
                read += len(group.members) * group.length
                continue
            # The last page is always read: it holds the new token.
            missing = -group.length % page
            read = read.to(ids.device) + (_counts(ids, group, page) * page - missing).sum()
        self.state.stats.add_read(int(read))

    def _verify(
        self,
        layer: int,
        place: int,
        group: RowGroup,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        cache = group.paged(key, value, options["page_size"])
        out, scores = decode_attention(query, *cache, return_page_scores=True, **options)
        self._scores.setdefault(layer, {})[place] = scores
        return out  # type: ignore[no-any-return]

    def _draft(
        self,
        layer: int,
        place: int,
        group: RowGroup,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        page = options["page_size"]
        ids = self._pages[layer].get(place)
        if ids is not None:
            ids = ids[:, None]
            options = {**options, "page_ids": ids, "page_counts": _counts(ids, group, page)}
        out: Tensor = decode_attention(query, *group.paged(key, value, page), **options)
        return out


def _exceeds(cfg: DeltaConfig, tokens: int) -> bool:
    pages = -(-tokens // cfg.page_size)
    return pages > cfg.pages_for(pages)


def _held_pages(scores: Tensor, tokens: int, drafts: int, cfg: DeltaConfig) -> Tensor:
    """Pages [R, any] int32, ascending, for drafts behind ``tokens``: the selected and the new ones.

    Scores are [R, pages]. All rows have as many tokens.
    """
    lengths = torch.full((len(scores),), tokens, dtype=torch.int32, device=scores.device)
    ids, _ = select_pages(scores, lengths, cfg)
    first, last = tokens // cfg.page_size, (tokens + drafts - 1) // cfg.page_size
    new = torch.arange(first, last + 1, dtype=torch.int32, device=ids.device)
    ids = ids.masked_fill((ids < 0) | (ids == first), _NO_PAGE)
    return torch.cat([ids, new.expand(len(ids), -1)], dim=1).sort(dim=1).values


def _counts(ids: Tensor, group: RowGroup, page_size: int) -> Tensor:
    """How many of the pages there are yet, [R, ...] int32."""
    return (ids < -(-group.length // page_size)).sum(dim=-1, dtype=torch.int32)


def check_draft_tokens(lossless: bool, draft_tokens: int | None) -> int:
    """The number of drafts before a verification; 0 where decoding is not lossless.

    Raises
    ------
    ArgumentError
        When it is outside 1 ... 16, or given without ``lossless``.
    """
    if not lossless:
        if draft_tokens is not None:
            raise ArgumentError(
                f"draft_tokens needs lossless=True, got draft_tokens={draft_tokens}"
            )
        return 0
    count = DRAFT_TOKENS if draft_tokens is None else draft_tokens
    if type(count) is not int:
        raise ArgumentTypeError(f"draft_tokens must be an int, got {count!r}")
    if not 1 <= count <= _MOST_DRAFTS:
        raise ArgumentError(f"draft_tokens must be in 1..{_MOST_DRAFTS}, got {count}")
    return count


def check_croppable(decoder: PreTrainedModel) -> None:
    """Refuse a model whose cache cannot take rejected drafts back.

    Raises
    ------
    UnsupportedModelError
        Naming the model and the layer.
    """
    for number, layer in enumerate(DeltaCache(decoder.config).layers):
        kind = type(layer)
        crops = kind in (DeltaLayer, DynamicLayer) or kind.__name__ == "DummyLayer"
        # Beyond its window it has lost what it would have to bring back, unless it records.
        crops |= kind is DynamicSlidingWindowLayer and hasattr(kind, "activate_past_recording")
        if not crops:
            raise UnsupportedModelError(
                f"{type(decoder).__name__} cannot decode losslessly: layer {number}'s cache, a "
                f"{kind.__name__}, cannot take rejected drafts back"
            )
