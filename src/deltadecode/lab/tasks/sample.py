"""What every task of an evaluation gives: samples made from seeds, with checkers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Verdict:
    """What a checker says of a generated text."""

    score: float  # from 0 to 1; 1 is right
    answer: str | None  # what was understood as the answer


def no_verdict(text: str) -> Verdict:
    """The checker of texts that nothing is expected of."""
    return Verdict(0.0, None)


@dataclass(frozen=True)
class Sample:
    """One problem; the same seed and task give the same."""

    seed: int
    prompt: str
    reference: str  # what a perfect model writes; empty where there are many ways to be right
    max_new_tokens: int  # those that an answer may take, if it is not the reference that says so
    check: Callable[[str], Verdict]


class Task(ABC):
    """Makes samples. The constructor's keyword arguments are the task's options."""

    name: ClassVar[str]
    positional: ClassVar[str | None] = None  # option that may be given as its value alone

    @abstractmethod
    def sample(self, seed: int, count_tokens: Callable[[str], int]) -> Sample:
        """Make the sample of a seed; tasks that fill a length count by the model's tokenizer."""


def match_all(expected: Sequence[str]) -> Callable[[str], Verdict]:
    """Checker whose score is the share of expected strings in a text (RULER, section 3)."""

    def check(text: str) -> Verdict:
        hits = [word for word in expected if word.casefold() in text.casefold()]
        return Verdict(len(hits) / len(expected), " ".join(hits) or None)

    return check


def options_of(task: Task) -> dict[str, Any]:
    """The options of a task, defaults included, for a record of what was run."""
    options = {name: value for name, value in vars(task).items() if not name.startswith("_")}
    return dict(sorted(options.items()))
