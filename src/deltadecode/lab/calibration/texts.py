"""The texts of a calibration: from files or a task, cut at the decode steps to be measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltadecode.architecture import longest_prompt, text_config
from deltadecode.errors import CalibrationError
from deltadecode.lab.generation import encode, new_tokens, unchecked
from deltadecode.lab.policies.base import Layout
from deltadecode.lab.policies.full import Full
from deltadecode.lab.tasks.sample import Sample, Task, no_verdict
from deltadecode.lab.tasks.text import Text

FORMAT = 'one JSON object a line, {"prompt": "...", "completion": "..."}, the completion optional'
# Apart from those of evaluations, which start at 3,000,000,000.
FIRST_SEED = 2_000_000_000


def read_texts(path: Path, count: int | None = None) -> list[Sample]:
    """Texts of a JSONL file in UTF-8, the first ``count`` of them (default: all).

    Each line that is not blank is an object with a ``prompt`` and, optionally, a ``completion``:
    what follows it, as some model wrote it; it becomes the sample's reference. Other keys are
    ignored. Seeds count from 0. Raises CalibrationError, with the line's number, when the file
    cannot be read, is empty, or a line is something else.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # -sig: a mark may lead
    except OSError as error:
        raise CalibrationError(f"cannot read the data {str(path)!r}: {error.strerror}") from error
    except UnicodeError as error:
        raise CalibrationError(f"the data {str(path)!r} is not text in UTF-8") from error
    samples: list[Sample] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and (count is None or len(samples) < count):
            prompt, completion = _parsed(line, f"line {number} of the data {str(path)!r}")
            samples.append(Sample(len(samples), prompt, completion, 0, no_verdict))
    if not samples:
        raise CalibrationError(f"the data {str(path)!r} is empty; it must hold {FORMAT}")
    return samples


def _parsed(line: str, where: str) -> tuple[str, str]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{where} is not JSON; the format is {FORMAT}") from error
    if not isinstance(value, dict):
        raise CalibrationError(f"{where} is no object; the format is {FORMAT}")
    prompt, completion = value.get("prompt"), value.get("completion", "")
    if not isinstance(prompt, str) or not prompt:
        raise CalibrationError(f"{where} has no prompt; the format is {FORMAT}")
    if not isinstance(completion, str):
        raise CalibrationError(f"{where} has a completion that is no text; the format is {FORMAT}")
    try:
        (prompt + completion).encode()
    except UnicodeEncodeError as error:  # JSON can write half of a pair
        raise CalibrationError(
            f"{where} has the lone surrogate {error.object[error.start]!r}"
        ) from None
    return prompt, completion


def task_texts(task: Task, tokenizer: Any, count: int, seed: int = FIRST_SEED) -> list[Sample]:
    """So many samples of a task, from the seed on."""

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    return [task.sample(number, tokens) for number in range(seed, seed + count)]


@dataclass(frozen=True)
class Piece:
    """The tokens of a text; the decode steps behind the first ``context`` of them are measured."""

    ids: list[int]
    context: int

    @property
    def rows(self) -> int:
        """Decode steps; the last token is only a target."""
        return len(self.ids) - self.context - 1


def make_pieces(
    model: Any, tokenizer: Any, texts: Sequence[Sample], rows: int, *, chat: bool = False
) -> list[Piece]:
    """Pieces of prompts and what follows them, of so many rows at most.

    The rows of the i-th of n texts begin at i / (n - 1) of the way to the last place in its
    reference, so that early and late steps are seen. A text without one is continued by the model,
    with full attention. Raises CalibrationError when a text is too long for the model or has too
    few tokens, and EvaluationError when ``chat`` finds no chat template.
    """
    pieces = []
    for number, text in enumerate(encode(texts, tokenizer, chat=chat)):
        if not text.prompt:
            raise CalibrationError(f"text {number + 1} has a prompt of no tokens")
        reference = text.reference
        if not reference:
            _check_length(model, number, len(text.prompt) + rows + 1)
            reference = _continuation(model, tokenizer, text.prompt, rows + 1)
        room = max(len(reference) - rows - 1, 0)
        context = len(text.prompt) + room * number // max(len(texts) - 1, 1)
        piece = Piece([*text.prompt, *reference][: context + rows + 1], context)
        if piece.rows < 1:
            raise CalibrationError(
                f"text {number + 1} must have at least 2 tokens behind its prompt, got "
                f"{len(reference)}"
            )
        _check_length(model, number, len(piece.ids))
        pieces.append(piece)
    return pieces


def _continuation(model: Any, tokenizer: Any, prompt: list[int], tokens: int) -> list[int]:
    policy = Full(Layout.of(model), 1)
    batch = [unchecked(prompt, tokens)]
    written = new_tokens(model, tokenizer, policy, batch, tokens, lambda step: None)
    return [int(token) for token in written[0]]


def _check_length(model: Any, number: int, tokens: int) -> None:
    longest = longest_prompt(text_config(model))
    if longest is not None and tokens - 1 > longest:
        raise CalibrationError(
            f"text {number + 1} has {tokens - 1} tokens with its rows, and the model has {longest} "
            "positions"
        )


def cut(tokenizer: Any, texts: Sequence[Text], count: int) -> list[Piece]:
    """``count`` pieces of some long texts, taken from them in turns.

    Raises EvaluationError where a text is too short for one.
    """
    each = range(FIRST_SEED, FIRST_SEED - (-count // len(texts)))
    turns = zip(*(text.pieces(tokenizer, each) for text in texts), strict=True)
    return [
        Piece(ids, text.context) for turn in turns for text, ids in zip(texts, turn, strict=True)
    ][:count]
