"""The texts of a calibration: from a file or from a task, cut where their generation starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltadecode.architecture import longest_prompt, text_config
from deltadecode.errors import CalibrationError
from deltadecode.lab.generation import encode
from deltadecode.lab.observe import Prompt
from deltadecode.lab.tasks.sample import Sample, Task, no_verdict

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


def make_prompts(
    model: Any, tokenizer: Any, texts: Sequence[Sample], new_tokens: int, *, chat: bool = False
) -> list[Prompt]:
    """Token ids from which the generation of each text starts.

    A text that has a reference starts inside it: the i-th of n at i / (n - 1) of the way to the
    last place with ``new_tokens`` behind it, so that early and late decode steps are seen without
    generating every text in full. A text without one starts behind its prompt. Raises
    CalibrationError when a text is too long for the model or its prompt has no token, and
    EvaluationError when ``chat`` finds no chat template.
    """
    prompts = []
    longest = longest_prompt(text_config(model))
    for number, text in enumerate(encode(texts, tokenizer, chat=chat)):
        room = max(len(text.reference) - new_tokens, 0)
        ids = [*text.prompt, *text.reference[: room * number // max(len(texts) - 1, 1)]]
        if len(ids) < 2:
            raise CalibrationError(f"text {number + 1} has fewer than 2 tokens")
        if longest is not None and len(ids) + new_tokens > longest:
            raise CalibrationError(
                f"text {number + 1} needs {len(ids) + new_tokens} tokens with {new_tokens} new "
                f"ones, and the model has {longest} positions"
            )
        prompts.append(Prompt(number, ids))
    return prompts
