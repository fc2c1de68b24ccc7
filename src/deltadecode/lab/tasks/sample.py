"""What every task of an evaluation gives: samples made from seeds, with checkers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Verdict:
    """What a checker says of a generated text.

    Attributes
    ----------
    score : float
        From 0 to 1; 1 is right.
    answer : str or None
        What was understood as the answer.
    """

    score: float
    answer: str | None


def no_verdict(text: str) -> Verdict:
    """The checker of texts that nothing is expected of."""
    return Verdict(0.0, None)


@dataclass(frozen=True)
class Sample:
    """One problem.

    Attributes
    ----------
    seed : int
        The same seed and task give the same sample.
    prompt : str
        What the model continues.
    reference : str
        What a perfect model writes; empty where there are many ways to be right.
    room : int
        New tokens that an answer may take, if it is not the reference that says so.
    check : callable
        Text to :class:`Verdict`.
    """

    seed: int
    prompt: str
    reference: str
    room: int
    check: Callable[[str], Verdict]


class Task(ABC):
    """Makes samples. The constructor's keyword arguments are the task's options."""

    name: ClassVar[str]

    @abstractmethod
    def sample(self, seed: int, count_tokens: Callable[[str], int]) -> Sample:
        """Make the sample of a seed.

        Parameters
        ----------
        seed : int
            Any.
        count_tokens : callable
            Tokens of a text, by the model's tokenizer, for tasks that fill a length.

        Returns
        -------
        Sample
        """


def match_all(expected: Sequence[str]) -> Callable[[str], Verdict]:
    """Checker that looks for every expected string, as RULER's metric does.

    Parameters
    ----------
    expected : sequence of str
        What must be in the text; at least one.

    Returns
    -------
    callable
        Its score is the share of them that is there (RULER, arXiv 2404.06654, section 3).
    """

    def check(text: str) -> Verdict:
        found = [each for each in expected if each.casefold() in text.casefold()]
        return Verdict(len(found) / len(expected), " ".join(found) or None)

    return check


def options_of(task: Task) -> dict[str, Any]:
    """The options of a task, defaults included, for a record of what was run."""
    return dict(sorted(vars(task).items()))
