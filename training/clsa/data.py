"""Text of three kinds, in rows of one length: chain problems, needles in chain text, Python.

A batch follows from its number alone, so all models see the same tokens, and a training that goes
on after a break goes on where it was. Targets are all tokens of a text, and the solution or answer
of a task; a mask tells the two apart.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator

import numpy as np
import torch
from python_library import library_files, package_files, read
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deltadecode.lab.tasks.chain import make_problem
from deltadecode.lab.tasks.text import read_text
from deltadecode.lab.tasks.vocabulary import NAMES

KINDS = ("chain", "needle", "text")
MIX = (4, 1, 1)  # how often a document is of each kind: Python's library has 3 M tokens of text
EOS, PAD, IGNORED = 0, 0, -100
VOCABULARY = 4096
HELD_OUT = 20  # one of so many files is for validation
_AT_ONCE = 256  # texts to encode
Row = tuple[Tensor, Tensor, Tensor]
# What GPT-2's pattern, which the tokenizer uses, makes of plain ASCII words.
_PIECES = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


@functools.cache
def python_text(validation: bool, packages: tuple[str, ...] = ()) -> list[str]:
    """Texts of Python's library, its topics of help and of packages, held out ones or the others.

    Texts held out are the same with packages as without, and some of theirs besides.
    """
    texts = [read(path) for path in library_files()]
    docs = read_text("stdlib-docs", "")
    texts += [docs[start : start + 20_000] for start in range(0, len(docs), 20_000)]
    texts += [read(path) for name in packages for path in package_files(name)]
    return [text for i, text in enumerate(texts) if (i % HELD_OUT == 0) == validation]


def build_tokenizer(positions: int, packages: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 4,096 tokens, trained on what the models are trained on."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    rng = random.Random(0)
    tasks = [document(rng, kind, 2000)[i] for kind in KINDS[:2] for i in (0, 1) for _ in range(150)]
    tokenizer.train_from_iterator([*python_text(False, packages), *tasks], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>",
        model_max_length=positions, padding_side="left",
    )  # fmt: skip


def document(rng: random.Random, kind: str, tokens: int) -> tuple[str, str]:
    """Prompt and answer of a task, of very roughly so many tokens."""
    if kind == "chain":
        most = max(1, min(tokens // 40, (len(NAMES) - 2) * 2 // 3))
        steps = rng.randint(1, most)
        problem = make_problem(rng.getrandbits(62), steps, rng.randint(0, steps // 2))
        return problem.prompt, problem.solution
    count = max(4, min(tokens // 10, len(NAMES) // 2))
    facts = make_problem(rng.getrandbits(62), 1, count).prompt.split("\n")[1 : count + 1]
    names = rng.sample(NAMES, rng.randint(1, 4))
    codes = {name: str(rng.randrange(10**6, 10**7)) for name in names}
    for name, code in codes.items():
        facts.insert(rng.randrange(len(facts)), f"the code of {name} is {code}")
    name = rng.choice(names)
    return "\n".join(["Facts", *facts, f"Question the code of {name} is"]), f" {codes[name]}"


class Rows:
    """Makes rows of token ids, targets, and a mask of those targets that are of answers.

    Parameters
    ----------
    tokenizer : Tokenizer
        As trained, or read from a file.
    validation : bool
        Take the texts that are held out.
    packages : tuple of str
        Installed packages whose sources are texts, too.
    """

    def __init__(
        self, tokenizer: Tokenizer, validation: bool = False, packages: tuple[str, ...] = ()
    ) -> None:
        self.tokenizer, self.known = tokenizer, {}
        texts = python_text(validation, packages)
        # What a tokenizer says of all texts at once is a hundred times their size.
        parts = (texts[at : at + _AT_ONCE] for at in range(0, len(texts), _AT_ONCE))
        encoded = (one for part in parts for one in tokenizer.encode_batch(part))
        self.text = np.concatenate([np.array([*one.ids, EOS], dtype=np.int32) for one in encoded])

    def encode(self, text: str) -> list[int]:
        """Token ids of a task's text, each piece of which is looked up once."""
        ids: list[int] = []
        for piece in _PIECES.findall(text):
            if piece not in self.known:
                self.known[piece] = self.tokenizer.encode(piece).ids
            ids += self.known[piece]
        return ids

    def row(self, rng: random.Random, length: int, kind: str | None) -> Row:
        """Ids, targets and mask [length] of documents of a kind, or of all, end to end."""
        ids, targets, answers = [], [], []
        while len(ids) <= length:
            chosen = kind or rng.choices(KINDS, MIX)[0]
            size = rng.randint(64, length)
            if chosen == "text":
                start = rng.randrange(max(1, len(self.text) - size))
                piece = self.text[start : start + size].tolist()
                ids += piece
                targets += piece
                answers += [False] * len(piece)
                continue
            prompt, answer = (self.encode(part) for part in document(rng, chosen, size))
            answer.append(EOS)
            ids += prompt + answer
            targets += [*[IGNORED] * len(prompt), *answer]
            answers += [*[False] * len(prompt), *[True] * len(answer)]
        following = slice(1, length + 1)
        made = (ids[:length], targets[following], answers[following])
        ids, targets, answers = map(torch.tensor, made)
        return ids, targets, answers


class Batches(torch.utils.data.Dataset):
    """Batch ``i`` of so many rows of a length: ids, targets and mask, each [rows, length]."""

    def __init__(self, rows: Rows, seed: int, count: int, length: int, first: int, last: int):
        self.rows, self.seed, self.count, self.length = rows, seed, count, length
        self.first, self.last = first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, i: int) -> Row:
        rng = random.Random(f"{self.seed}/{self.length}/{self.first + i}")
        made = [self.rows.row(rng, self.length, None) for _ in range(self.count)]
        ids, targets, answers = map(torch.stack, zip(*made, strict=True))
        return ids, targets, answers


def loader(batches: Batches, workers: int) -> Iterator[Row]:
    """Batches in their order, made in the background."""
    return iter(
        torch.utils.data.DataLoader(
            batches, batch_size=None, num_workers=workers,
            prefetch_factor=4 if workers else None, pin_memory=torch.cuda.is_available(),
        )
    )  # fmt: skip
