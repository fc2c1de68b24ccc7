"""How many tokens to draft before the next verification (docs/semantics.md, R12)."""

from __future__ import annotations

import math
import time

from deltadecode.engines.times import Times

clock = time.perf_counter

# A draft is made while it will be kept with this chance, all those before it included. It takes
# about so much of what a token takes in the mean.
_WORTH = 0.7
# Of a call's drafts before any was verified, as if so many had been; then the newest count most.
_CHANCE, _WEIGHT, _FORGET = 0.92, 8.0, 0.95
# Rounds that pay are compared with a new plain step so often.
_REFRESH = 16


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

    def end(self, drafts: int, tokens: int, timed: bool = True) -> None:
        """Count what was verified: ``tokens`` that all rows moved on by, of ``drafts`` + 1.

        A round that did more besides is not ``timed``.
        """
        if drafts:
            self._kept = _FORGET * self._kept + min(tokens - 1, drafts)
            self._tried = _FORGET * self._tried + min(tokens, drafts)
        if self.times is None or not timed:
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
