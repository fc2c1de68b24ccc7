"""Texts to train an index on, none of which an evaluation of this project decodes.

| kind | rows |
|---|---|
| code | Python's library without the modules of ``text:stdlib-code`` |
| docs | its topics of help without the pieces that ``text:stdlib-docs`` cuts |
| needle | needles, single and multi-key, with their answers |
| chain | chain problems with their solutions, for the embedded model |

Seeds of problems lie below 2**31, those of evaluations above.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import torch
from python_library import library_files, read
from torch import Tensor

from deltadecode.errors import EvaluationError
from deltadecode.lab.tasks.chain import make_problem
from deltadecode.lab.tasks.registry import TASKS
from deltadecode.lab.tasks.ruler import Needle
from deltadecode.lab.tasks.text import Text, code_files, read_text
from deltadecode.lab.tasks.vocabulary import NAMES

FIRST_SEED = 4_000_000_000  # of evaluations; those of training are below 2**31
KINDS = ("docs", "code", "needle", "chain")
CONTEXTS = (2000, 4000, 7500)  # of the comparison of policies
PIECES, TOKENS = 4, 128  # of each
_GRAM = 16  # tokens in a row by which a piece is found again


def code_text() -> str:
    """Python's library without what evaluations read, in an order that mixes its packages."""
    evaluated = set(code_files())
    paths = [path for path in library_files("encodings") if path not in evaluated]
    random.Random(0).shuffle(paths)
    return "\n\n".join(read(path) for path in paths)


def docs_ids(tokenizer: Any) -> list[int]:
    """Tokens of the topics of help that are in none of the evaluations' pieces."""
    ids: list[int] = tokenizer(
        read_text("stdlib-docs", ""), add_special_tokens=False, verbose=False
    ).input_ids
    grams = set()
    for context in CONTEXTS:
        task = Text("stdlib-docs", context=context, tokens=TOKENS)
        for piece in task.pieces(tokenizer, range(PIECES)):
            grams |= {tuple(piece[i : i + _GRAM]) for i in range(len(piece) - _GRAM + 1)}
    seen = [False] * len(ids)
    for i in range(len(ids) - _GRAM + 1):
        if tuple(ids[i : i + _GRAM]) in grams:
            seen[i : i + _GRAM] = [True] * _GRAM
    return [token for token, out in zip(ids, seen, strict=True) if not out]


def answer(prompt: str) -> str:
    """What a perfect model writes behind a needle's question."""
    (key,) = re.findall(r"what is the code of the (.*), given above", prompt)
    (code,) = re.findall(rf"The code of the {key} is (\d+)", prompt)
    return f" {code}."


class Rows:
    """Row ``i`` follows from its number alone, so a training goes on where it was.

    Parameters
    ----------
    kinds
        Of `KINDS`, taken in turns.
    length
        Most tokens of a row; needles and chains are about as long, or end earlier.
    """

    def __init__(self, tokenizer: Any, kinds: tuple[str, ...], length: int, seed: int) -> None:
        self.tokenizer, self.kinds, self.length, self.seed = tokenizer, kinds, length, seed
        self.texts: dict[str, list[int]] = {}
        if "docs" in kinds:
            self.texts["docs"] = docs_ids(tokenizer)
        if "code" in kinds:
            # Twenty megabytes of library are more than any training here sees.
            self.texts["code"] = self._encode(code_text()[:4_000_000])

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def row(self, i: int) -> Tensor:
        """Token ids [T] int64 with T <= length."""
        rng = random.Random(f"index/{self.seed}/{i}")
        kind = self.kinds[i % len(self.kinds)]
        if kind in self.texts:
            ids = self.texts[kind]
            start = rng.randrange(max(1, len(ids) - self.length))
            return torch.tensor(ids[start : start + self.length])
        if kind == "needle":
            task = Needle(rng.choice(("single", "multikey")), self.length - 128)
            sample = task.sample(rng.getrandbits(31), lambda text: len(self._encode(text)))
            text = sample.prompt + answer(sample.prompt)
        else:
            # A step has about 29 tokens, its fact included; another fact 9.
            steps = rng.randint(8, max(8, min(213, self.length // 29)))
            spare = max(0, min(self.length // 9 - 3 * steps, len(NAMES) - steps - 1))
            problem = make_problem(rng.getrandbits(31), steps, rng.randint(0, spare))
            text = problem.prompt + problem.solution
        return torch.tensor(self._encode(text)[: self.length])


class ChainText(Text):
    """Chain problems led along their solutions: a text's losses, of the embedded model's task.

    The prompt and what stands before token ``context`` are in the cache. Seeds count from those
    that evaluations have.
    """

    name = "chain-text"
    positional = None

    def __init__(
        self, steps: int = 24, distractors: int = 200, context: int = 2000, tokens: int = 256
    ) -> None:
        self.steps, self.distractors = steps, distractors
        self.context, self.tokens = context, tokens

    def pieces(self, tokenizer: Any, seeds: Sequence[int]) -> list[list[int]]:
        """Token ids of a problem and its solution for each seed."""
        pieces = []
        for seed in seeds:
            problem = make_problem(FIRST_SEED + seed, self.steps, self.distractors)
            ids = tokenizer(problem.prompt + problem.solution, add_special_tokens=False).input_ids
            if len(ids) < self.needed:
                raise EvaluationError(
                    f"a problem of task 'chain-text' has {len(ids)} tokens, and context + tokens "
                    f"+ 1 are {self.needed}"
                )
            pieces.append(ids[: self.needed])
        return pieces


TASKS[ChainText.name] = ChainText
