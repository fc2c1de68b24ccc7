"""Tokens attended to, from lengths and the plan: counting costs the device nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from deltadecode.engines.serving.settings import ServingSettings


def attended_tokens(settings: ServingSettings, tokens: int) -> tuple[int, int]:
    """What one decode step of one sequence attends to, over the planned layers.

    ``tokens`` are in the cache, the new one included. Returns the numbers of DELTA and of full
    attention. With L = 0 the last page may be left out, and the first is an upper bound.
    """
    config = settings.config
    page = config.page_size
    pages, selected = -(-tokens // page), tokens
    budget = config.pages_for(pages)
    if pages > budget and tokens >= settings.min_tokens:
        last = (tokens - 1) % page + 1 if config.recent_pages else page
        selected = (budget - 1) * page + last
    sparse, planned = settings.layer_counts
    return (planned - sparse) * tokens + sparse * selected, planned * tokens


@dataclass
class StepCounts:
    """Tokens attended to in the decode steps that ran."""

    settings: ServingSettings
    attended: int = field(default=0, init=False)
    full: int = field(default=0, init=False)

    def add_row(self, tokens: int, new_tokens: int = 1) -> None:
        """Count one row of a batch; no row of a prompt.

        Parameters
        ----------
        tokens : int
            In the sequence, up to and including the first new one.
        new_tokens : int
            More than one where drafts are verified, each with pages of its own (R10).
        """
        for seen in range(tokens, tokens + new_tokens):
            attended, full = attended_tokens(self.settings, seen)
            self.attended += attended
            self.full += full

    def take(self) -> tuple[int, int]:
        """Attended and full tokens since the last call."""
        taken = self.attended, self.full
        self.attended = self.full = 0
        return taken


def describe(settings: ServingSettings, longest: int) -> str:
    """One line for the log: the plan, and what a step at ``longest`` tokens attends to."""
    config = settings.config
    attended, full = attended_tokens(settings, longest)
    pages = f"{config.recent_pages} recent, {config.sink_pages} sink"
    if config.budget_share:
        pages = f"{config.budget_share:.4g} of all, if more; {pages}"
    sync = ", selection over the heads of all ranks" if settings.sync_heads else ""
    short = f", all below {settings.min_tokens} tokens" if settings.reads_more_when_short else ""
    return (
        f"dense layers {layer_numbers(config.dense_layers) or 'none'}, "
        f"Δ-layers {layer_numbers(config.delta_layers)}, {config.budget_pages} pages of "
        f"{config.page_size} tokens ({pages}){sync}{short}; "
        f"a step at {longest} tokens attends to {attended / full:.1%} of them"
    )


def layer_numbers(layers: Sequence[int]) -> str:
    """As metrics and the log show them: ``0 1``."""
    return " ".join(map(str, layers))
