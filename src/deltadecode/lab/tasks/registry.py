"""The tasks of an evaluation by name, with options, such as ``needle:kind=multikey``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltadecode.errors import EvaluationError
from deltadecode.lab.tasks.chain import (
    DEFAULT_DISTRACTORS,
    DEFAULT_STEPS,
    extract_answer,
    make_problem,
)
from deltadecode.lab.tasks.ruler import Needle, VariableTracking
from deltadecode.lab.tasks.sample import Sample, Task, Verdict
from deltadecode.lab.tasks.text import Text


class Chain(Task):
    """The embedded model's task; see :func:`deltadecode.lab.tasks.make_problem`."""

    name = "chain"

    def __init__(self, steps: int = DEFAULT_STEPS, distractors: int = DEFAULT_DISTRACTORS) -> None:
        make_problem(0, steps, distractors)  # refuses sizes that cannot be
        self.steps, self.distractors = steps, distractors

    def sample(self, seed: int, count_tokens: Callable[[str], int]) -> Sample:
        """Make the problem of a seed; see :meth:`Task.sample`."""
        del count_tokens
        problem = make_problem(seed, self.steps, self.distractors)

        def check(text: str) -> Verdict:
            answer = extract_answer(text)
            return Verdict(float(answer == problem.answer), answer)

        return Sample(seed, problem.prompt, problem.solution, 0, check)


class Perplexity(Task):
    """How likely a policy finds what full attention would have written; needs no answers.

    The prompt of another task (``prompts``, of ``length`` tokens if it has a length), or a piece of
    a text, is continued greedily with full attention by ``tokens`` tokens; each policy is then led
    along that continuation, and its log-probabilities are added up. ``prompts="text"`` reads the
    UTF-8 ``file``; each sample takes a piece at a place of its own.
    """

    name = "perplexity"

    def __init__(
        self, tokens: int = 256, prompts: str = "needle", length: int = 2048, file: str = ""
    ) -> None:
        if tokens < 2 or length < 64:
            raise EvaluationError("task 'perplexity' needs tokens >= 2 and length >= 64")
        self.tokens, self.prompts, self.length, self.file = tokens, prompts, length, file
        if prompts == "text":
            try:
                Path(file).read_text(encoding="utf-8-sig")
            except (OSError, UnicodeError) as error:
                raise EvaluationError(
                    f"cannot read the text {file!r} of task 'perplexity'"
                ) from error
        elif prompts not in TASKS or prompts == self.name:
            others = ", ".join(name for name in TASKS if name != self.name)
            raise EvaluationError(f"prompts of task 'perplexity' must be text, {others}")

    def sample(self, seed: int, count_tokens: Callable[[str], int]) -> Sample:
        """Take the prompt of a seed; there is nothing to check."""
        if self.prompts == "text":
            text = Path(self.file).read_text(encoding="utf-8-sig")
            words = text.split(" ")
            per_word = max(count_tokens(text[:20_000]) / max(len(text[:20_000].split(" ")), 1), 1.0)
            size = max(int(self.length / per_word), 1)
            place = seed * 7919 % max(len(words) - size, 1)
            prompt = " ".join(words[place : place + size])
        else:
            kind = TASKS[self.prompts]
            has_length = "length" in inspect.signature(kind).parameters
            source = kind(**({"length": self.length} if has_length else {}))
            prompt = source.sample(seed, count_tokens).prompt
        return Sample(seed, prompt, "", self.tokens, lambda text: Verdict(0.0, None))


TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Chain, Needle, VariableTracking, Text, Perplexity)
}


def make_task(text: str) -> Task:
    """Make a task from ``name`` or ``name:option=value:option=value``.

    A file may have a colon in its name.
    Raises EvaluationError for an unknown task or option, listing the known, or a value that cannot
    be.
    """
    name, *parts = text.strip().split(":")
    if name not in TASKS:
        raise EvaluationError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    known = inspect.signature(TASKS[name]).parameters
    options: dict[str, Any] = {}
    key = ""
    for part in parts:
        if key == "file" and part.partition("=")[0] not in known:
            options["file"] += f":{part}"
            continue
        positional = TASKS[name].positional
        if "=" not in part and part and positional is not None and positional not in options:
            part = f"{positional}={part}"
        key, sign, value = part.partition("=")
        if key not in known or not sign:
            raise EvaluationError(
                f"unknown option {part!r} of task {name!r}; there are {', '.join(known)}, each "
                "written option=value"
            )
        if known[key].annotation in (int, "int"):
            if not value.isdigit():
                raise EvaluationError(f"{key} of task {name!r} must be a number, got {value!r}")
            options[key] = int(value)
        else:
            options[key] = value
    try:
        return TASKS[name](**options)
    except ValueError as error:
        raise EvaluationError(f"task {text!r}: {error}") from error
