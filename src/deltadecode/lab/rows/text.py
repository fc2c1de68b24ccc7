"""The losses of R rows of a text under a policy, from one forward pass."""

from __future__ import annotations

from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltadecode.architecture import longest_prompt, text_config
from deltadecode.engines.transformers.swap import attending
from deltadecode.errors import EvaluationError, PolicyError
from deltadecode.lab.policies.base import Policy
from deltadecode.lab.policies.delta import Delta
from deltadecode.lab.policies.full import Full
from deltadecode.lab.policies.masked import MaskedPolicy
from deltadecode.lab.rows.attention import (
    NAME,
    DeltaPass,
    FullPass,
    Holder,
    PolicyPass,
    RowsPass,
    RowsView,
)
from deltadecode.lab.rows.borders import Memory, Steps, decoder_layers, delta_steps, starting_at
from deltadecode.lab.rows.cache import foreign_state, rows_cache

MEMORY = 48 * 2**20  # bytes of hidden states that a text keeps of earlier passes


@dataclass(frozen=True, eq=False)
class RowLosses:
    """A policy on the rows of a text, beside full attention; all [R], in nats where not said."""

    nll: Tensor  # float32, minus the log-probability of the text's own next token
    nll_full: Tensor  # the same under full attention
    kl: Tensor  # float32, KL(full || policy) of the next token
    same: Tensor  # bool, whether both would write the same token

    @classmethod
    def of(cls, log_probs: Tensor, full: Tensor, targets: Tensor) -> RowLosses:
        """Compare log-probabilities [R, V] with those of full attention; targets [R]."""
        target = targets[:, None]
        kl = torch.nn.functional.kl_div(log_probs, full, reduction="none", log_target=True)
        return cls(
            nll=-log_probs.gather(1, target)[:, 0],
            nll_full=-full.gather(1, target)[:, 0],
            kl=kl.sum(dim=1),
            same=log_probs.argmax(dim=1) == full.argmax(dim=1),
        )


def refusal(model: Any, policy: Policy | None = None) -> str | None:
    """Why the rows of a text cannot go through at once, by model or policy; None if they can."""
    foreign = foreign_state(model.config)
    if foreign is not None:
        name = type(model).__name__
        return f"{name} keeps a {foreign} besides keys and values; decode it step by step"
    known = (Delta, Full, MaskedPolicy)
    if policy is not None and (policy.history or not isinstance(policy, known)):
        return f"policy {policy.name!r} needs the decode steps before; decode it step by step"
    return None


class RowsText:
    """One text prepared once: its prefix in a cache, and full attention's log-probabilities.

    Row r is the decode step of token ``context`` + r, with n = ``context`` + r + 1 tokens in the
    cache. Keys and values of the rows come from the pass itself, as in decoding. A pass that does
    in its first layers what an earlier one did starts behind them; ``memory`` bounds what is kept
    for that, in bytes, beside full attention's own hidden states.
    """

    full: Tensor  # [R, V] float32 log-probabilities under full attention
    targets: Tensor  # [R] int64, the text's own next tokens
    lengths: Tensor  # [R] int64, n of each row

    @classmethod
    def prepare(cls, model: Any, ids: Tensor, context: int, *, memory: int = MEMORY) -> RowsText:
        """Prefill ``ids`` [context + rows + 1] int64 up to the first row.

        Raises EvaluationError where there is no row, the text goes past the model's positions, or
        the model has a state that no cache of keys and values holds.
        """
        rows = len(ids) - context - 1
        if context < 1 or rows < 1:
            raise EvaluationError(
                f"a text needs 1 token before its rows and 1 behind, got {len(ids)} tokens with "
                f"{context} before the rows"
            )
        positions = longest_prompt(text_config(model))
        if positions is not None and len(ids) - 1 > positions:
            raise EvaluationError(
                f"the text must not be longer than the model's {positions} positions, got "
                f"{len(ids) - 1} tokens"
            )
        reason = refusal(model)
        if reason is not None:
            raise EvaluationError(reason)
        return cls(model, ids.to(model.device), context, memory)

    def __init__(self, model: Any, ids: Tensor, context: int, memory: int) -> None:
        self._rows = ids[None, context:-1]
        self.context, self.targets = context, ids[context + 1 :]
        self.view = RowsView.of(context, self._rows.shape[1], ids.device)
        self.lengths = self.view.lengths
        self._cache = rows_cache(model.config, context, self._rows.shape[1])
        self._layers = decoder_layers(model)
        self._memory = Memory(memory)
        # Before each layer and after the last, under full attention.
        self._full_states: dict[int, Tensor] = {}
        with torch.inference_mode():
            with attending(model, NAME, Holder()):
                model(ids[None, :context], past_key_values=self._cache, logits_to_keep=1)
            self.full = self._pass(model, FullPass(self.view), 0, None, self._full_states)
        if self._layers and len(self._full_states) < len(self._layers):
            self._layers = None  # they give more than hidden states to each other

    def head(self, rows: int) -> RowsText:
        """The first rows as a text of its own; it shares the cache, which each pass writes anew.

        It keeps half as many bytes of earlier passes, as a state of fewer rows is smaller.
        """
        part = copy(self)
        part.targets, part.full = self.targets[:rows], self.full[:rows]
        part.view = RowsView.of(self.context, len(part.targets), self.targets.device)
        part.lengths, part._rows = part.view.lengths, self._rows[:, :rows]
        part._full_states = {place: state[:, :rows] for place, state in self._full_states.items()}
        part._memory = Memory(self._memory.limit // 2)
        return part

    def log_probs(self, model: Any, policy: Policy) -> Tensor:
        """[R, V] float32 log-probabilities of the next token under a policy.

        Raises PolicyError for a policy that needs the steps before. The policy's ``counts`` then
        tell what the rows read, as steps of one batch row with a prompt of ``context``.
        """
        reason = refusal(model, policy)
        if reason is not None:
            raise PolicyError(reason)
        if isinstance(policy, Full):
            return self.full
        with torch.inference_mode():
            if isinstance(policy, Delta):
                return self._delta(model, policy)
            assert isinstance(policy, MaskedPolicy)
            masked = PolicyPass(self.view, policy)
            log_probs = self._pass(model, masked, 0, None, {})
            policy.note_rows(masked.reads)
            return log_probs

    def compare(self, log_probs: Tensor) -> RowLosses:
        """Losses of log-probabilities [R, V], row by row."""
        return RowLosses.of(log_probs, self.full, self.targets)

    def _delta(self, model: Any, policy: Delta) -> Tensor:
        steps = delta_steps(policy)
        start, known = self._start(policy, steps)
        seen: dict[int, Tensor] = {}
        delta = DeltaPass(self.view, policy, known)
        log_probs = self._pass(model, delta, start, self._state(steps[:start]), seen)
        if self._layers is not None:
            for place, state in seen.items():
                if any(steps[:place]):
                    self._memory[steps[:place]] = state
            for layer, page_scores in delta.page_scores.items():
                self._memory[_scores_key(policy, steps, layer)] = page_scores
        return log_probs

    def _start(self, policy: Delta, steps: Steps) -> tuple[int, dict[int, Tensor]]:
        """The last layer that a pass can start at, and the page scores of Δ-layers before it."""
        if self._layers is None:
            return 0, {}
        sources = policy.plan.sources
        for start in range(len(steps), 0, -1):
            needed = {source for source in sources[start:] if source is not None and source < start}
            keys = {source: _scores_key(policy, steps, source) for source in needed}
            has_state = not any(steps[:start]) or steps[:start] in self._memory
            if has_state and all(key in self._memory for key in keys.values()):
                return start, {source: self._memory[key] for source, key in keys.items()}
        return 0, {}

    def _state(self, steps: Steps) -> Tensor | None:
        if not any(steps):
            return self._full_states.get(len(steps))
        return self._memory[steps]

    def _pass(
        self, model: Any, work: RowsPass, start: int, state: Tensor | None, seen: dict[int, Tensor]
    ) -> Tensor:
        holder = Holder()
        holder.current = work
        starting = starting_at(self._layers, start, state, seen) if self._layers else nullcontext()
        with attending(model, NAME, holder), starting:
            logits = model(self._rows, past_key_values=self._cache).logits[0]
        log_probs: Tensor = logits.float().log_softmax(dim=1)
        return log_probs


def _scores_key(policy: Delta, steps: Steps, layer: int) -> tuple[Any, ...]:
    return ("page scores", policy.cfg.page_size, steps[:layer])
