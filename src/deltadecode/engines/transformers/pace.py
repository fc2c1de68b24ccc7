"""How many tokens to draft before the next verification (docs/semantics.md, R12)."""

from __future__ import annotations

import math
import time
from collections import deque
from statistics import median_low

clock = time.perf_counter

# A draft is made while it will be kept with this chance, all those before it included. It takes
# about so much of what a token takes in the mean.
_WORTH = 0.7
# Of a call's drafts before any was verified, as if so many had been; then the newest count most.
_CHANCE, _WEIGHT, _FORGET = 0.92, 8.0, 0.95
# Plain steps before drafts that took too long are tried again, at first and at most.
_WAIT, _LONGEST_WAIT = 16, 512
# Rounds that pay are compared with a new plain step so often.
_REFRESH = 16
# Rounds that decide, unless the first ones are slower by such a factor.
_ENOUGH, _CLEARLY = 3, 1.25


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
        mean = sum(taken for taken, _ in self.rounds) / sum(given for _, given in self.rounds)
        plain = median_low(self.plain)
        if len(self.rounds) < _ENOUGH and mean < _CLEARLY * plain:
            return
        if mean > plain:
            self.rest, self.wait = self.wait, min(2 * self.wait, _LONGEST_WAIT)
            self.rounds.clear()
        else:
            self.wait = _WAIT


class Pace:
    """What one call of ``generate`` drafts.

    Parameters
    ----------
    most : int
        Largest number of drafts before a verification.
    fixed : bool
        Always draft so many.
    times : Times or None
        None: drafts do not depend on the clock, so that a seed gives the same tokens again.

    Attributes
    ----------
    selects : bool
        Whether the next verification is to select pages, for drafts behind it.
    """

    def __init__(self, most: int, fixed: bool = True, times: Times | None = None) -> None:
        self.most, self.fixed, self.times = most, fixed, times
        self.selects = True
        self._tried, self._kept = _WEIGHT, _WEIGHT * _CHANCE
        self._rounds = 0
        self._start = 0.0

    @property
    def _chance(self) -> float:
        return min(self._kept / self._tried, 0.999)

    def begin(self) -> int:
        """Drafts to make now, if there are pages to read."""
        self._start = clock()
        self.selects = True
        if self.times is not None and self.times.rest > 0:
            self.times.rest -= 1
            self.selects = self.times.rest == 0
            return 0
        if self.fixed:
            return self.most
        return max(1, min(self.most, int(math.log(_WORTH) / math.log(self._chance))))

    def end(self, drafts: int, tokens: int) -> None:
        """Count what was verified: ``tokens`` that all rows moved on by, of ``drafts`` + 1."""
        if drafts:
            self._kept = _FORGET * self._kept + min(tokens - 1, drafts)
            self._tried = _FORGET * self._tried + min(tokens, drafts)
        if self.times is None:
            return
        seconds = clock() - self._start
        if drafts:
            # One round may be lucky: what it would give by the chance of all of them.
            mean = (1 - self._chance ** (drafts + 1)) / (1 - self._chance)
            self.times.add_round(seconds, mean)
            self._rounds += 1
            if self.times.rest == 0 and self._rounds % _REFRESH == 0:
                self.times.rest = 2  # of two, the second one selects, which takes longer
        elif not self.selects:
            self.times.add_plain(seconds)
