"""The task ``text``: how well a policy predicts a real text's own next tokens."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltadecode.errors import EvaluationError
from deltadecode.lab.tasks.sample import Sample, Task, no_verdict

SOURCES = ("stdlib-docs", "stdlib-code")
# Files of Python's library that every supported version has, long ones of many kinds.
_MODULES = (
    "argparse", "ast", "bdb", "calendar", "cmd", "codecs", "collections/__init__", "configparser",
    "contextlib", "copy", "csv", "dataclasses", "difflib", "dis", "enum", "fractions", "ftplib",
    "functools", "gettext", "heapq", "inspect", "json/decoder", "locale", "mailbox", "optparse",
    "pdb", "pickle", "platform", "pprint", "random", "shutil", "smtplib", "statistics",
    "subprocess", "tarfile", "textwrap", "threading", "tokenize", "traceback", "typing",
    "unittest/mock", "uuid",
)  # fmt: skip


class Text(Task):
    """Pieces of a text, scored by the loss of its own tokens.

    A piece is ``context`` tokens that are in the cache, and ``tokens`` decode steps behind them,
    each led along the text. The text is a ``file`` in UTF-8, or of a ``source`` that every machine
    with this version of Python has: ``stdlib-docs`` (its topics of help) or ``stdlib-code`` (some
    of its library).
    """

    name = "text"
    positional = "source"

    def __init__(
        self, source: str = "", file: str = "", context: int = 4000, tokens: int = 128
    ) -> None:
        if bool(source) == bool(file):
            raise EvaluationError(
                f"task 'text' needs either file=... or a source, {' or '.join(SOURCES)}"
            )
        if source and source not in SOURCES:
            raise EvaluationError(
                f"unknown source {source!r} of task 'text'; there are {', '.join(SOURCES)}, and "
                "file=..."
            )
        if context < 1 or tokens < 1:
            raise EvaluationError("task 'text' needs context >= 1 and tokens >= 1")
        self.source, self.file, self.context, self.tokens = source, file, context, tokens
        self._text = read_text(source, file)
        self.digest = hashlib.sha256(self._text.encode()).hexdigest()[
            :16
        ]  # files change, and so does Python

    @property
    def needed(self) -> int:
        """Tokens of a piece; the last is only predicted."""
        return self.context + self.tokens + 1

    def pieces(self, tokenizer: Any, seeds: Sequence[int]) -> list[list[int]]:
        """Token ids of a piece for each of consecutive seeds.

        Pieces do not overlap as long as there is room. Where the tokenizer begins texts with a
        token of its own, so does every piece. Raises EvaluationError where the text is too short.
        """
        ids: list[int] = tokenizer(self._text, add_special_tokens=False, verbose=False).input_ids
        begin = tokenizer.bos_token_id
        first = [begin] if begin is not None and begin in tokenizer("a").input_ids[:1] else []
        size = self.needed - len(first)
        if len(ids) < size:
            raise EvaluationError(
                f"the text {self.file or self.source!r} has {len(ids) + len(first)} tokens, and "
                f"context + tokens + 1 are {self.needed}"
            )
        places = list(range(len(ids) // size))
        random.Random("text").shuffle(places)
        pieces = []
        for number, seed in enumerate(seeds):
            shift = number // len(places) * 997  # a prime, when all places are taken
            start = (places[seed % len(places)] * size + shift) % (len(ids) - size + 1)
            pieces.append([*first, *ids[start : start + size]])
        return pieces

    def sample(self, seed: int, count_tokens: Callable[[str], int]) -> Sample:
        """A piece as text, of about so many tokens, for whoever continues prompts."""
        per_token = len(self._text) / max(count_tokens(self._text), 1)
        context, size = int(self.context * per_token), int(self.needed * per_token)
        start = seed * 7919 % max(len(self._text) - size, 1)
        piece = self._text[start : start + size]
        return Sample(seed, piece[:context], piece[context:], self.tokens, no_verdict)


def code_files() -> list[Path]:
    """The files of Python's library that ``stdlib-code`` is made of, in its order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [folder / f"{module}.py" for module in _MODULES]


def read_text(source: str, file: str) -> str:
    """The text of a source or a file; EvaluationError where it cannot be read."""
    if source == "stdlib-docs":
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise EvaluationError(
                "this Python has no pydoc_data.topics, which stdlib-docs needs"
            ) from None
        return "\n\n".join(topics[name] for name in sorted(topics))
    if source == "stdlib-code":
        return "\n\n".join(_read(path) for path in code_files())
    return _read(Path(file))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise EvaluationError(f"cannot read the text {str(path)!r}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or a name that cannot be
        raise EvaluationError(
            f"cannot read the text {str(path)!r}: it is no text in UTF-8"
        ) from error
