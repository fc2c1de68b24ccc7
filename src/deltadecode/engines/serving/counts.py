"""Tokens attended to, from lengths and the plan: counting costs the device nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from deltadecode.config import SHARE_DEN, DeltaConfig
from deltadecode.engines.serving.settings import ServingSettings

# Lengths in the first table of what a sequence attends to; it grows with the sequences.
_FIRST_LENGTHS = 4096

Ints = TypeVar("Ints", int, NDArray[np.int64])


def attended_tokens(settings: ServingSettings, tokens: Ints) -> tuple[Ints, Ints]:
    """What one decode step of one sequence attends to, over the planned layers.

    ``tokens``, a number or an array of such, are in the cache, the new one included. Returns the
    numbers of DELTA and of full attention. With L = 0 the last page may be left out, and the first
    is an upper bound.
    """
    config = settings.config
    page = config.page_size
    pages = -(-tokens // page)
    budget = _budgets(config, pages)
    last = (tokens - 1) % page + 1 if config.recent_pages else page
    leaves_out = (pages > budget) & (tokens >= settings.min_tokens)
    selected = np.where(leaves_out, (budget - 1) * page + last, tokens)
    sparse, planned = settings.layer_counts
    attended, full = (planned - sparse) * tokens + sparse * selected, planned * tokens
    return (int(attended), int(full)) if isinstance(tokens, int) else (attended, full)


def _budgets(config: DeltaConfig, pages: Ints) -> Any:
    """K(N) as :meth:`DeltaConfig.pages_for` has it, of all rows at once."""
    return np.maximum(config.budget_pages, -(-config.share_num * pages // SHARE_DEN))


def _nothing() -> NDArray[np.int64]:
    return np.zeros(0, dtype=np.int64)


@dataclass
class StepCounts:
    """Tokens attended to in the decode steps that ran."""

    settings: ServingSettings
    attended: int = field(default=0, init=False)
    full: int = field(default=0, init=False)
    # By the tokens of a sequence, so that no step computes it for each row.
    _attended: NDArray[np.int64] = field(default_factory=_nothing, init=False)

    def add(
        self, tokens: Sequence[int] | NDArray[np.int64], new_tokens: Sequence[int] = ()
    ) -> None:
        """Count rows of a batch; none of a prompt.

        A step waits for this, so all rows are counted at once.

        Parameters
        ----------
        tokens : sequence of int
            In each sequence, up to and including the first new one.
        new_tokens : sequence of int
            Of each; more than one where drafts are verified, each with pages of its own (R10). One
            each where there are none.
        """
        seen = np.asarray(tokens, dtype=np.int64)
        most = max(new_tokens, default=0)
        if most > 1:
            places = np.arange(most)
            seen = (seen[:, None] + places)[places < np.asarray(new_tokens)[:, None]]
        try:
            attended = self._attended[seen]
        except IndexError:
            lengths = np.arange(max(_FIRST_LENGTHS, 2 * int(seen.max())), dtype=np.int64)
            self._attended = attended_tokens(self.settings, lengths)[0]
            attended = self._attended[seen]
        self.attended += int(attended.sum())
        self.full += self.settings.layer_counts[1] * int(seen.sum())

    def add_verifications(
        self, tokens: Sequence[int], new_tokens: Sequence[int], kept: Sequence[int]
    ) -> None:
        """Count rows in lossless mode: drafts, and the full attention behind them (R11).

        The first two are as in :meth:`add`; ``kept`` are tokens that each verification gave.
        """
        config, (_, planned) = self.settings.config, self.settings.layer_counts
        page, first = config.page_size, np.asarray(tokens, dtype=np.int64)[:, None]
        new, given = (np.asarray(each, dtype=np.int64)[:, None] for each in (new_tokens, kept))
        places = np.arange(max([1, *new_tokens, *kept]))
        seen, before = first + places, first - 1
        # What was selected; and from the page of the newest decided token on, all of them.
        older = (_budgets(config, -(-before // page)) - (before % page > 0)) * page
        read = np.minimum(seen, older + seen - before // page * page)
        drafted = (read * (places < new - 1)).sum()
        self.attended += planned * int(drafted + (before + new).sum())
        self.full += planned * int((seen * (places < given)).sum())

    def take(self) -> tuple[int, int]:
        """Attended and full tokens since the last call."""
        taken = self.attended, self.full
        self.attended = self.full = 0
        return taken


def describe(settings: ServingSettings, longest: int, drafts: int = 0) -> str:
    """One line for the log: the plan, and what a step at ``longest`` tokens attends to.

    With ``drafts``, the most of a step in lossless mode, it is what each of those reads.
    """
    config = settings.config
    attended, full = attended_tokens(settings.within(longest), longest)
    pages = f"{config.recent_pages} recent, {config.sink_pages} sink"
    if config.budget_share:
        pages = f"{config.budget_share:.4g} of all, if more; {pages}"
    sync = ", selection over the heads of all ranks" if settings.sync_heads else ""
    short = f", all below {settings.min_tokens} tokens" if settings.reads_more_when_short else ""
    if drafts:
        return (
            f"lossless: up to {drafts} drafts of a step read {config.budget_pages} pages of "
            f"{config.page_size} tokens ({pages}) in each of {len(settings.plan.attention_layers)} "
            f"layers{sync}, then full attention verifies them"
        )
    return (
        f"dense layers {layer_numbers(config.dense_layers) or 'none'}, "
        f"Δ-layers {layer_numbers(config.delta_layers)}, {config.budget_pages} pages of "
        f"{config.page_size} tokens ({pages}){sync}{short}; "
        f"a step at {longest} tokens attends to {attended / full:.1%} of them"
    )


def layer_numbers(layers: Sequence[int]) -> str:
    """As metrics and the log show them: ``0 1``."""
    return " ".join(map(str, layers))
