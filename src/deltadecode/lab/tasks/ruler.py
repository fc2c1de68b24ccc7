"""Needle retrieval and variable tracking in the form of RULER (arXiv 2404.06654), from a seed.

The tasks follow the paper's section 3; the texts are this project's own, and so are the filler
sentences, so that nothing has to be downloaded. A prompt is as long as asked for, counted by the
tokenizer of the model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

from deltadecode.errors import EvaluationError
from deltadecode.lab.tasks.sample import Sample, Task, match_all

_FILLER = (
    "The river was low that week and the boats stayed in the harbour.",
    "Nobody at the market remembered when the old clock had stopped.",
    "A light wind came over the hills and turned the leaves on the path.",
    "The train to the coast was late again, so the passengers read.",
    "In the library two students argued quietly about a map.",
    "Rain fell on the roof of the workshop until the evening.",
    "The baker swept the floor and left the door open for the cat.",
    "Someone had painted the fence green, and then half of it blue.",
)
_FIRST = ("amber", "brisk", "candid", "dusty", "early", "frosty", "gentle", "hollow", "ivory",
          "jolly", "keen", "lively", "mellow", "narrow", "olive", "proud", "quiet", "rustic",
          "silver", "tidy", "upper", "violet", "windy", "young")  # fmt: skip
_SECOND = ("anchor", "bridge", "castle", "desert", "engine", "forest", "garden", "hammer", "island",
           "jacket", "kettle", "ladder", "meadow", "needle", "orchard", "pillow", "quarry",
           "ribbon", "saddle", "tunnel", "valley", "window", "yard", "zipper")  # fmt: skip
_KINDS = ("single", "multikey", "multivalue")


class Needle(Task):
    """Needles, each a key with a seven-digit code, in filler; the question asks for one key.

    ``kind`` is ``"single"``: one needle; ``"multikey"``: ``needles`` keys, of which one is asked
    for; or ``"multivalue"``: one key with ``needles`` codes, all of which are asked for. ``length``
    is in tokens of the prompt, about.
    """

    name = "needle"

    def __init__(self, kind: str = "single", length: int = 4096, needles: int = 4) -> None:
        if kind not in _KINDS:
            raise EvaluationError(f"kind of task 'needle' must be one of {', '.join(_KINDS)}")
        most = len(_FIRST) * len(_SECOND)
        if length < 64 or not 1 <= needles <= most:
            raise EvaluationError(
                f"task 'needle' needs length >= 64 and 1 to {most} needles, got {length} and "
                f"{needles}"
            )
        self.kind, self.length, self.needles = kind, length, needles

    def sample(self, seed: int, count_tokens: Callable[[str], int]) -> Sample:
        """Make the sample of a seed; see :meth:`Task.sample`."""
        rng = random.Random(f"needle {seed}")
        count = 1 if self.kind == "single" else self.needles
        pairs = rng.sample([f"{a} {b}" for a in _FIRST for b in _SECOND], count)
        keys = [pairs[0]] * count if self.kind == "multivalue" else pairs
        codes = [str(code) for code in rng.sample(range(1_000_000, 10_000_000), count)]
        needles = [f"The code of the {k} is {c}." for k, c in zip(keys, codes, strict=True)]
        asked = keys[0]
        expected = codes if self.kind == "multivalue" else codes[:1]
        many = "All the codes" if len(expected) > 1 else "The code"
        opening = "Somewhere in this text there are secret codes. Remember them.\n\n"
        question = f"\n\nQuestion: what is the code of the {asked}, given above?\n{many} of the "
        question += f"{asked}, as the text says:"
        body = haystack(rng, needles, self.length - count_tokens(opening + question), count_tokens)
        max_new_tokens = 24 * len(expected) + 16
        return Sample(seed, opening + body + question, "", max_new_tokens, match_all(expected))


class VariableTracking(Task):
    """Chains of assignments in filler; the question asks for all names that hold one value.

    ``length`` is in tokens of the prompt, about. ``hops`` are the assignments after the first of
    each chain, 4 in the paper's base setting; one chain of ``chains`` is asked for.
    """

    name = "tracking"

    def __init__(self, length: int = 4096, hops: int = 4, chains: int = 1) -> None:
        if length < 64 or hops < 1 or chains < 1:
            raise EvaluationError(
                f"task 'tracking' needs length >= 64, hops >= 1 and chains >= 1, got {length}, "
                f"{hops} and {chains}"
            )
        self.length, self.hops, self.chains = length, hops, chains

    def sample(self, seed: int, count_tokens: Callable[[str], int]) -> Sample:
        """Make the sample of a seed; see :meth:`Task.sample`."""
        rng = random.Random(f"tracking {seed}")
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        names: list[str] = []
        while len(names) < self.chains * (self.hops + 1):
            name = "".join(rng.choices(letters, k=5))
            if name not in names:
                names.append(name)
        values = rng.sample(range(10_000, 100_000), self.chains)
        lines: list[list[str]] = []
        for chain, value in enumerate(values):
            own = names[chain * (self.hops + 1) :][: self.hops + 1]
            copies = [f"VAR {b} = VAR {a}." for a, b in pairwise(own)]
            lines.append([f"VAR {own[0]} = {value}.", *copies])
        needles = interleaved(rng, lines)
        opening = "The text below assigns values to variables. Follow the assignments.\n\n"
        question = f"\n\nQuestion: which variables hold the value {values[0]}? There are "
        question += f"{self.hops + 1}.\nThe variables that hold {values[0]} are:"
        body = haystack(
            rng, needles, self.length - count_tokens(opening + question), count_tokens, ordered=True
        )
        expected = names[: self.hops + 1]
        return Sample(
            seed, opening + body + question, "", 12 * len(expected) + 16, match_all(expected)
        )


def haystack(
    rng: random.Random,
    needles: Sequence[str],
    tokens: int,
    count_tokens: Callable[[str], int],
    *,
    ordered: bool = False,
) -> str:
    """At most so many tokens of filler, with the needles at random places or in their order."""
    sizes = [max(count_tokens(" " + sentence), 1) for sentence in _FILLER]
    left = tokens - sum(count_tokens(" " + needle) for needle in needles)
    sentences: list[str] = []
    while left >= min(sizes):
        place = rng.randrange(len(_FILLER))
        if sizes[place] <= left:
            sentences.append(_FILLER[place])
            left -= sizes[place]
    places = [rng.randint(0, len(sentences)) for _ in needles]
    if ordered:
        places.sort()
    # From the back, so that what is put in does not move the places before it.
    for place, needle in sorted(zip(places, needles, strict=True), key=lambda p: p[0])[::-1]:
        sentences.insert(place, needle)
    return " ".join(sentences)


def interleaved(rng: random.Random, chains: Sequence[Sequence[str]]) -> list[str]:
    """All lines of all chains, each chain in its order."""
    left = [list(chain) for chain in chains]
    lines: list[str] = []
    while any(left):
        chain = rng.choice([chain for chain in left if chain])
        lines.append(chain.pop(0))
    return lines
