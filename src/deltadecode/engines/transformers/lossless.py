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

from deltadecode.config import MOST_DRAFTS
from deltadecode.engines.transformers.cache import DeltaCache
from deltadecode.engines.transformers.held import Held, Part
from deltadecode.engines.transformers.layers import DeltaLayer
from deltadecode.engines.transformers.rows import RowGroup
from deltadecode.engines.transformers.step import Rows
from deltadecode.errors import ArgumentError, ArgumentTypeError, UnsupportedModelError
from deltadecode.ops import decode_attention

if TYPE_CHECKING:
    from deltadecode.engines.transformers.state import ModelState

DRAFT_TOKENS = 8
# Layer -> number of the row group -> page scores.
Scores = dict[int, dict[int, Tensor]]


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
    selects : bool
        Whether the verification in progress selects pages.
    """

    def __init__(self, state: ModelState) -> None:
        self.state = state
        self.phase = Phase.VERIFY
        self.selects = True
        self._rows: Rows | None = None
        self._scores: Scores = {}
        self._parts: list[Part] = []  # of the last verification, one for each row group
        self._held: dict[int, Held] = {}  # layer -> what its drafts read

    @property
    def ready(self) -> bool:
        """Whether drafts would read less than full attention."""
        return any(part.pages is not None for part in self._parts)

    def verify(
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
        rows = self._rows
        if layer == self.state.first:
            rows = self._rows = Rows.of(self.state.cfg, key, mask)
            self._scores, self._parts, self._held = {}, [], {}
            self.state.stats.add_read(rows.full_tokens)
        if rows is None or rows.device != key.device:
            rows = self._rows = Rows.of(self.state.cfg, key, mask)
        if rows.every_page or not self.selects:
            return None
        query = query.transpose(1, 2).contiguous().to(key.dtype)
        return rows.each_group(
            query,
            lambda place, group, part: self._attend(layer, place, group, part, key, value, options),
        )

    def select(self, kept: int, rejected: int) -> None:
        """Select pages for drafts, by the last of a verification's tokens that stays in the cache.

        ``kept`` tokens stay, and the ``rejected`` behind them have left it.
        """
        if self._rows is None:  # weights are dropped at random: full attention all along
            return
        every_layer = len(self._scores) == len(self.state.plan.attention_layers)
        for place, group in enumerate(self._rows.groups):
            tokens = group.length - rejected
            lengths = range(tokens - kept + 1, tokens + 1)
            self.state.stats.add_full(len(group.members) * sum(lengths))
            if every_layer:
                # All layers at once: their rows are as long.
                scores = [by_group[place][:, kept - 1] for by_group in self._scores.values()]
                together = torch.stack([part.to(group.device) for part in scores])
                part = Part.of(group.first_tokens(tokens), together, self.state.cfg)
                self._parts.append(part)
        self._scores = {}

    def held(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask that a draft reads in one layer, its own token the last one.

        Key and value are the whole cache [B, Hkv, slots, D].
        """
        held = self._held.get(layer)
        if held is None:
            parts = [part.to(key.device) for part in self._parts]
            place = self.state.plan.attention_layers.index(layer)
            page, drafts = self.state.cfg.page_size, self.state.draft_tokens
            held = self._held[layer] = Held(parts, place, key, value, page, drafts)
        states = held.append(key[:, :, -1:], value[:, :, -1:])
        if layer == self.state.first:
            self.state.stats.add_read(held.tokens)
        return states

    def _attend(
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
        # Some models view it in another shape, as they may what the stock functions give.
        return out.contiguous()  # type: ignore[no-any-return]


def check_flag(name: str, value: bool) -> None:
    """Refuse with an ArgumentError what is neither True nor False: ``"no"`` would count as True."""
    if type(value) is not bool:
        raise ArgumentTypeError(f"{name} must be True or False, got {value!r}")


def check_draft_tokens(lossless: bool, draft_tokens: int | None) -> int:
    """The largest number of drafts before a verification; 0 where decoding is not lossless.

    Raises
    ------
    ArgumentError
        When it is outside 1 ... 16, or given without ``lossless``, or for other types.
    """
    check_flag("lossless", lossless)
    if not lossless:
        if draft_tokens is not None:
            raise ArgumentError(
                f"draft_tokens needs lossless=True, got draft_tokens={draft_tokens}"
            )
        return 0
    count = DRAFT_TOKENS if draft_tokens is None else draft_tokens
    if type(count) is not int:
        raise ArgumentTypeError(f"draft_tokens must be an int, got {count!r}")
    if not 1 <= count <= MOST_DRAFTS:
        raise ArgumentError(f"draft_tokens must be in 1..{MOST_DRAFTS}, got {count}")
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
