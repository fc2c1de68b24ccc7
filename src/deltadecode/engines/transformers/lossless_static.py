"""Lossless decoding from a static cache: what drafts read stays on the device (R12).

Nothing is copied. A draft reads the pages that its layer selected, and all pages from that of the
newest decided token on, where they lie in the cache. So a CUDA graph can hold a draft, and another
one a verification: no Python number in them changes from one pass to the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltadecode.engines.draft_pages import count_older, list_pages
from deltadecode.engines.transformers.lossless import Phase
from deltadecode.engines.transformers.static import decode_rows
from deltadecode.engines.transformers.static_cache import DeltaStaticCache
from deltadecode.engines.transformers.step import StaticStep
from deltadecode.ops import DecodeInputs, select_pages

if TYPE_CHECKING:
    from deltadecode.engines.transformers.state import ModelState


class StaticDrafting:
    """What one call of ``generate`` carries from a verification to its drafts.

    Parameters
    ----------
    state : ModelState
        Of the model that decodes.
    cache : DeltaStaticCache
        That holds the prompt.
    offsets : list of int
        Slot of each row's first token.

    Attributes
    ----------
    phase : Phase
        Of the pass in progress.
    selects : bool
        Whether verifications select pages.
    scores : bool
        Whether the verification in progress scores pages, to select by them.
    ready : bool
        Whether drafts would read less than full attention.
    first_slots : Tensor
        [B] int32, ``offsets`` on the device.
    """

    def __init__(self, state: ModelState, cache: DeltaStaticCache, offsets: list[int]) -> None:
        self.state = state
        cfg, layers = state.cfg, state.plan.attention_layers
        first: Any = cache.layers[state.first]
        self.device = device = first.device
        self._places = {layer: place for place, layer in enumerate(layers)}
        # Drafts begin inside of a page, and may end inside of another.
        new = 1 + -(-state.draft_tokens // cfg.page_size)
        width = cfg.table_width(first.slots // cfg.page_size) + new
        shape = len(layers), len(offsets)
        # Pages that drafts read, and how many of them lie before that of the newest decided token.
        self._ids = torch.zeros(*shape, width, dtype=torch.int32, device=device)
        self._older = torch.zeros(shape, dtype=torch.int32, device=device)
        self._newest = torch.zeros(shape[1], dtype=torch.int32, device=device)
        self._columns = torch.arange(width, dtype=torch.int32, device=device)
        self.first_slots = torch.zeros(shape[1], dtype=torch.int32, device=device)
        self._scores: Tensor | None = None
        self._step: StaticStep | None = None
        self._counts = self._older
        self.restart(offsets)

    def restart(self, offsets: list[int]) -> None:
        """Begin a call with rows whose first tokens lie in these slots."""
        self.offsets = offsets
        self.phase, self.selects = Phase.VERIFY, True
        self.scores = self.ready = False
        self.first_slots.copy_(torch.tensor(offsets))
        self._attends = False  # it does not where weights are dropped at random
        # Tokens of the cache behind the pass in progress, and behind the last verification that
        # selected, padding included.
        self._tokens = self._decided = 0

    def begin(self, tokens: int) -> None:
        """Count a pass behind which the cache holds so many tokens, padding included."""
        self._tokens = tokens
        lengths = [tokens - offset for offset in self.offsets]
        if self.phase is Phase.VERIFY:
            self.scores = self.selects and self._leaves_out(lengths)
            self.state.stats.add_read(sum(lengths))
            return
        self.scores = False
        page = self.state.cfg.page_size
        whole = sum((self._decided - offset) // page * page for offset in self.offsets)
        self.state.stats.add_read(sum(lengths) - whole)
        self.state.stats.add_unread(self.state.first, -page * self._older[0].sum())

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Attention of one planned layer, in a draft or a verification.

        Query [B, Hq, Q, D] to the output [B, Q, Hq, D]; key and value [B, Hkv, slots, D] are
        buffers of a :class:`DeltaStaticLayer`. The mask is [B or 1, 1, Q, slots] bool. ``options``
        are those of :func:`deltadecode.ops.decode_attention`.
        """
        self._attends = True
        step, drafts, place = self._step, self.phase is Phase.DRAFT, self._places[layer]
        page_size, device = self.state.cfg.page_size, key.device
        if layer == self.state.first or step is None:
            step = self._step = StaticStep.of(mask if mask is None else mask[:, :, -1:], key)
            pages = (step.seq_lens.to(self._older.device) + (page_size - 1)) // page_size
            self._counts = self._older + pages - self._newest
        query = query.transpose(1, 2).to(key.dtype).contiguous()
        inputs = DecodeInputs(
            query, key, value, step.table(key, page_size), step.seq_lens.to(device),
            page_size=page_size, **{name: options[name] for name in ("scale", "sinks", "softcap")},
            return_page_scores=self.scores,
        )  # fmt: skip
        if drafts:
            inputs.q = query[:, 0]
            inputs.page_ids = self._ids[place].to(device)
            inputs.page_counts = self._counts[place].to(device)
        out, scores = decode_rows(inputs)
        if scores is not None:
            if self._scores is None:
                shape = len(self._places), len(query), self.state.draft_tokens + 1, scores.shape[2]
                self._scores = scores.new_zeros(shape, device=self._ids.device)
            self._scores[place, :, : scores.shape[1]] = scores
        return out[:, None] if drafts else out

    def select(self, kept: int, rejected: int) -> None:
        """Select pages for drafts, by the last of a verification's tokens that stays in the cache.

        ``kept`` tokens stay, and the ``rejected`` behind them have left it.
        """
        cfg, tokens = self.state.cfg, self._tokens - rejected
        lengths = [tokens - offset for offset in self.offsets]
        if self._attends:
            self.state.stats.add_full(sum(n - back for n in lengths for back in range(kept)))
        self.ready = self._attends and self.scores and self._leaves_out(lengths)
        if not self.ready or self._scores is None:
            return
        self._decided = tokens
        lens = tokens - self.first_slots
        scores = self._scores[:, :, kept - 1]
        ids, _ = select_pages(scores.flatten(0, 1), lens.repeat(len(scores)), cfg)
        ids, newest = ids.view(*scores.shape[:2], -1), lens // cfg.page_size
        older = count_older(ids, newest)
        # In place: graphs of drafts read these.
        list_pages(ids, older, newest, self._columns, self._ids)
        self._older.copy_(older)
        self._newest.copy_(newest)

    def _leaves_out(self, lengths: list[int]) -> bool:
        """Whether the longest row has more pages than a draft may read."""
        return not self.state.cfg.reads_all(max(lengths))
