"""Whether drafts of lossless mode pay, by what steps have taken (docs/semantics.md, R12)."""

from __future__ import annotations

from collections import deque
from statistics import median_low

# Plain steps before drafts that took too long are tried again, at first and at most.
_WAIT, _LONGEST_WAIT = 64, 512
# Rounds that decide; fewer do, where all of them are slower by such a factor.
_ENOUGH, _FEWEST, _CLEARLY = 3, 2, 1.25


class Times:
    """What tokens took with drafts and without, of one shape of batch; kept between calls."""

    def __init__(self) -> None:
        self.plain: deque[float] = deque(maxlen=3)
        self.rounds: deque[tuple[float, float]] = deque(maxlen=6)
        self.warm = False  # a first round of all compiles, allocates and finds memory cold
        self.wait = _WAIT
        # Steps without drafts that are still to come: two to measure, and one that selects.
        self.rest = 3

    def add_plain(self, seconds: float) -> None:
        """Count a step of full attention that gave a token and selected nothing."""
        self.plain.append(seconds)

    def add_round(self, seconds: float, tokens: float) -> None:
        """Count drafts and their verification, and rest where they take longer than they give.

        ``tokens`` are those that such a round gives in the mean.
        """
        if not self.warm:
            self.warm = True
            return
        self.rounds.append((seconds, tokens))
        if not self.plain:
            return
        # An engine that was held up says nothing of its steps: one long round decides nothing.
        token = median_low(taken / given for taken, given in self.rounds)
        plain = median_low(self.plain)
        few = len(self.rounds) < _ENOUGH
        if few and (len(self.rounds) < _FEWEST or token < _CLEARLY * plain):
            return
        if token > plain:
            self.rest, self.wait = self.wait, min(2 * self.wait, _LONGEST_WAIT)
            self.rounds.clear()
        else:
            self.wait = _WAIT
