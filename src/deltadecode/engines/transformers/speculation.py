"""The loop of ``generate`` in lossless mode: draft, verify, keep (docs/semantics.md, R12 to R14).

All rows of a batch hold equally many tokens in the cache. A row whose drafts were accepted further
than its neighbours' keeps what is decided, and puts it in the place of new drafts.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils.generic import ModelOutput

from deltadecode.engines.transformers.acceptance import choose, verify
from deltadecode.engines.transformers.lossless import Drafting, Phase
from deltadecode.engines.transformers.lossless_static import StaticDrafting
from deltadecode.engines.transformers.pace import Pace
from deltadecode.engines.transformers.passes import Kept, Passes, narrowed, on_gpu
from deltadecode.engines.transformers.state import ModelState
from deltadecode.engines.transformers.static_cache import DeltaStaticCache

# More than any text has: a row that is finished waits for nobody, and nobody waits for it.
_FINISHED = 2**40


class Speculation:
    """One call of ``generate``: what ``GenerationMixin._sample`` gets, and how far the rows are.

    Attributes
    ----------
    ids : Tensor
        [B, width] int64: prompt, emitted tokens, decided tokens of rows that are ahead, drafts.
    decided : Tensor
        [B] int64: tokens of each row that will not change.
    emitted : int
        Tokens of all rows that were shown to the stopping criteria.
    """

    def __init__(
        self,
        model: Any,
        state: ModelState,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.model, self.state, self.ids = model, state, input_ids
        self.processor, self.criteria = logits_processor, stopping_criteria
        self.settings, self.streamer, self.kwargs = generation_config, streamer, model_kwargs
        self.drafting: Drafting | StaticDrafting = Drafting(state)
        self.passes: Passes | None = None  # from a static cache
        self.graphs = False
        rows, self.emitted = input_ids.shape
        timed = not state.draft_fixed and not generation_config.do_sample
        times = state.times_of(rows, self.emitted) if timed else None
        self.pace = Pace(state.draft_tokens, state.draft_fixed, times)
        self.decided = torch.full((rows,), self.emitted, device=input_ids.device)
        self.unfinished = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        # As in the stock loop: without an end token, a row goes on until all are finished.
        self.ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        pad = generation_config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad)
        # Masks and positions cover the first token behind the prompt, as the class leaves them.
        self.covered = self.emitted + 1

    def run(self) -> Any:
        """Generate, and return what ``_sample`` does."""
        outputs = self.model._prefill(self.ids, self.settings, self.kwargs)
        self.kwargs = self.model._update_model_kwargs_for_generation(outputs, self.kwargs)
        self.cache = self.kwargs["past_key_values"]
        self.cache.activate_past_recording()
        if isinstance(self.cache, DeltaStaticCache):
            self.passes = Passes.of(self.model, self.state, self.cache, self._offsets())
            self.drafting = self.passes.drafting
            self.cache_is_ours = not getattr(self.cache, "_is_user_defined", False)
            self.graphs = (
                on_gpu(self.cache)
                and not self.model.training
                and not getattr(self.settings, "disable_compile", False)
            )
        self.state.local.drafting = self.drafting
        try:
            self._settle(outputs.logits[:, -1:], [])
            del outputs
            # Experts are computed in another way for few tokens; older versions know no such thing.
            with getattr(self.model, "_optimize_model_for_decode", nullcontext)():
                while bool(self.unfinished.any()):
                    self._round()
        finally:
            self.state.local.drafting = None
            for layer in self.cache.layers:
                if hasattr(layer, "record_past"):
                    layer.record_past = False
        if self.passes is not None and self.passes.captured and self.cache_is_ours:
            self.state.kept_cache = Kept(self.cache)
        if self.streamer is not None:
            self.streamer.end()
        ids = self.ids[:, : self.emitted]
        if not self.settings.return_dict_in_generate:
            return ids
        output: Any = GenerateDecoderOnlyOutput  # its annotations name tuples of one tensor
        return output(
            sequences=ids,
            scores=tuple(self.scores) if self.settings.output_scores else None,
            logits=tuple(self.logits) if self.settings.output_logits else None,
            past_key_values=self.cache,
        )

    def _offsets(self) -> list[int]:
        """Slot of each row's first token; what lies before it is padding."""
        mask = self.kwargs.get("attention_mask")
        if mask is None:
            return [0] * len(self.ids)
        offsets: list[int] = mask.int().argmax(dim=1).tolist()
        return offsets

    def _round(self) -> None:
        """Draft, verify, and take what was rejected out of the cache."""
        count = self._draft_count()
        self.drafting.selects = self.pace.selects
        self.drafting.phase = Phase.DRAFT
        probs = [self._draft(place) for place in range(count)]
        if count:
            self._crop(count)
        self.drafting.phase = Phase.VERIFY
        logits = self._forward(self.emitted + count, count + 1)
        before = self.emitted
        self._settle(logits, probs)
        kept = self.emitted - before
        self._crop(count + 1 - kept)
        self.drafting.select(kept, count + 1 - kept)
        captured = self.passes is not None and self.passes.fresh
        self.pace.end(count, kept, timed=not captured)
        if self.passes is not None:
            self.passes.fresh = False

    def _draft_count(self) -> int:
        count = self.pace.begin()
        count = count if self.drafting.ready else 0
        if self.graphs:
            count = narrowed(count, self.state.draft_tokens)
        longest = self.criteria.max_length
        if longest is not None:  # the verification gives one token more than there are drafts
            count = min(count, longest - self.emitted - 1)
        if isinstance(self.cache, DeltaStaticCache):
            count = min(count, self.cache.room - self.emitted)
        return max(count, 0)

    def _draft(self, place: int) -> Tensor | None:
        """Draft one token of each row, or take what is decided; what was drawn from, or None."""
        column = self.emitted + place
        logits = self._forward(column, 1)[:, -1]
        scores = self.processor(self.ids[:, :column], logits)
        tokens, probs = choose(scores, self.settings.do_sample)
        self._widen(column + 1)
        known = self.decided > column
        self.ids[:, column] = torch.where(known, self.ids[:, column], tokens)
        return probs

    def _settle(self, logits: Tensor, probs: list[Tensor | None]) -> None:
        """Decide tokens by the logits [B, drafts + 1, V] of a verification, and emit them."""
        start, scored = self.emitted, []
        drafted = (start + len(probs) - self.decided).clamp(min=0).sum()
        self._widen(start + logits.shape[1])
        pending = self.decided < _FINISHED
        verified = torch.zeros((), dtype=torch.int64, device=self.ids.device)
        taken = verified.clone()
        for place in range(logits.shape[1]):
            column = start + place
            raw = logits[:, place].to(torch.float32, copy=True)
            scores = self.processor(self.ids[:, :column], raw)
            scored.append((scores, raw))
            open_rows = pending & (self.decided == column)
            if place < len(probs):
                tokens, accepted = verify(scores, self.ids[:, column], probs[place])
                verified += open_rows.sum()
                taken += (open_rows & accepted).sum()
                pending &= accepted | ~open_rows
            else:
                tokens, _ = choose(scores, self.settings.do_sample)
            self.ids[:, column] = torch.where(open_rows, tokens, self.ids[:, column])
            self.decided += open_rows
            # Places behind the last rejection change nothing, and to look would wait for a GPU.
            if logits.is_cpu and not bool(pending.any()):
                break
        end, *counts = torch.stack([self.decided.min(), drafted, verified, taken]).tolist()
        self._emit(end, scored)
        if probs:
            self.state.stats.add_drafts(*counts)

    def _emit(self, end: int, scored: list[tuple[Tensor, Tensor]]) -> None:
        """Show the tokens up to ``end`` to the stopping criteria, one column after the other."""
        keeps = self.settings.return_dict_in_generate
        for scores, raw in scored[: end - self.emitted]:
            column = self.emitted
            if self.ends:
                self.ids[:, column] = self.ids[:, column].where(self.unfinished, self.pad)
            if keeps and self.settings.output_scores:
                self.scores.append(scores)
            if keeps and self.settings.output_logits:
                self.logits.append(raw)
            self.emitted += 1
            shown = tuple(self.scores) if self.scores else None
            self.unfinished &= ~self.criteria(self.ids[:, : self.emitted], shown)
            if self.streamer is not None:
                self.streamer.put(self.ids[:, column].cpu())
            if self.ends:
                self.decided = self.decided.where(self.unfinished, _FINISHED)
            if not bool(self.unfinished.any()):
                break

    def _forward(self, end: int, count: int) -> Tensor:
        """Logits of the last ``count`` tokens of ``ids[:, :end]``, float32."""
        if self.passes is not None:
            self.passes.drafting.begin(end)
            replayed = self._replayed(self.passes, end, count) if self.graphs else None
            if replayed is not None:
                return replayed.to(torch.float32)
        kwargs = self.kwargs
        extra = end - self.covered
        if extra > 0:
            kwargs = self.model._update_model_kwargs_for_generation(
                ModelOutput(), dict(kwargs), num_new_tokens=extra
            )
        inputs = self.model.prepare_inputs_for_generation(
            self.ids[:, :end], next_sequence_length=count, **kwargs
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = count
        logits: Tensor = self.model(**inputs, return_dict=True).logits
        if self.graphs and self.passes is not None:
            self.passes.see(inputs, end - count)
        return logits[:, -count:].to(self.ids.device, torch.float32)

    def _replayed(self, passes: Passes, end: int, count: int) -> Tensor | None:
        """As :meth:`_forward`, from a CUDA graph; None where there is none of it."""
        tokens = passes.room_for(end, count)
        if tokens == 0:
            return None
        ids = self.ids[:, end - count : end]
        ids = torch.nn.functional.pad(ids, (0, tokens - count), value=self.pad)
        logits = passes.run(self.model, self.cache, ids)
        if logits is not None and tokens > count:
            self.cache.crop(count - tokens)
        return logits if logits is None else logits[:, :count]

    def _crop(self, tokens: int) -> None:
        # Layers that record their past drop what they need no more, even where nothing is taken.
        if tokens or any(getattr(layer, "record_past", False) for layer in self.cache.layers):
            self.cache.crop(-tokens)

    def _widen(self, width: int) -> None:
        missing = width - self.ids.shape[1]
        if missing > 0:
            self.ids = torch.nn.functional.pad(self.ids, (0, missing), value=self.pad)
