"""Chain problems: long reasoning that punishes forgetting, with an exact checker.

A prompt lists shuffled facts, one per node. The solution walks from node to node and keeps a
running digit. A step needs its node's fact from anywhere in the prompt, and a third of the steps
also need the digit that a line written long before gave to another node. One wrong look-up or
sum changes every later line, so the answer depends on all of them.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from deltadecode.errors import EvaluationError
from deltadecode.lab.tasks.vocabulary import NAMES

PLAIN_STEP_TOKENS = 18
RECALL_STEP_TOKENS = 22
RECALL_SHARE = 3  # one step in three recalls a generated line
DEFAULT_STEPS = 213  # a multiple of three whose solution passes 4,000 tokens, some to spare
DEFAULT_DISTRACTORS = 28
DEFAULT_MIN_BACK = 1000
_ANSWER = re.compile(r"the answer is (\w+ \d)\b")


@dataclass(frozen=True)
class Problem:
    """One chain problem."""

    prompt: str  # the facts and the question; the model continues after its last character
    solution: str  # what a perfect model writes, one line per step and one for the answer
    answer: str  # the last node and its digit, such as "kamo 7"
    steps: int  # of the solution, the answer line not counted
    facts: int  # in the prompt, distractors included
    # for every step that recalls a generated line: its own index and that line's index
    recalls: tuple[tuple[int, int], ...]
    seed: int


def _choose_recalls(rng: random.Random, steps: int, min_back: int) -> dict[int, int]:
    """Map each recalling step to the earlier step whose line it needs, each line once.

    Distances are counted in tokens from the end of the needed line to the start of the
    recalling one, so that the needed digit is at least `min_back` tokens away.
    """
    wanted = steps // RECALL_SHARE
    first = -(-min_back // PLAIN_STEP_TOKENS) + 1
    if max(steps - first, 0) < wanted:
        raise EvaluationError(
            f"min_back={min_back} leaves {max(steps - first, 0)} of {steps} steps that can recall, "
            f"and {wanted} must"
        )
    recalling = set(rng.sample(range(first, steps), wanted))
    line_start = 0
    starts: list[int] = []
    open_lines: list[int] = []
    reached = 0
    chosen: dict[int, int] = {}
    for step in range(steps):
        starts.append(line_start)
        while reached < step and starts[reached + 1] <= line_start - min_back:
            open_lines.append(reached)
            reached += 1
        if step in recalling:
            pick = rng.randrange(len(open_lines))
            open_lines[pick], open_lines[-1] = open_lines[-1], open_lines[pick]
            chosen[step] = open_lines.pop()
            line_start += RECALL_STEP_TOKENS
        else:
            line_start += PLAIN_STEP_TOKENS
    return chosen


def _write_steps(
    nodes: list[str], start: int, digits: list[int], recalls: dict[int, int]
) -> tuple[list[str], list[str], int]:
    """Facts and solution lines of the walk, and the last digit."""
    facts: list[str] = []
    lines: list[str] = []
    values: list[int] = []
    value = start
    for step, digit in enumerate(digits):
        node, following = nodes[step], nodes[step + 1]
        if step in recalls:
            line = recalls[step]
            source, digit = nodes[line + 1], values[line]
            fact = f"{node} leads to {following} and adds {source}"
            shown = f"{fact} : {source} holds {digit}"
        else:
            fact = shown = f"{node} leads to {following} and adds {digit}"
        total = (value + digit) % 10
        facts.append(fact)
        lines.append(f"{shown} : {value} + {digit} = {total} so {following} holds {total}")
        value = total
        values.append(total)
    return facts, lines, value


def make_problem(
    seed: int,
    steps: int = DEFAULT_STEPS,
    distractors: int = DEFAULT_DISTRACTORS,
    min_back: int | None = None,
) -> Problem:
    """Make the chain problem of a seed; 213 steps write about 4,130 tokens.

    ``distractors`` are facts about nodes that the walk never visits. ``min_back`` is the least
    distance in tokens from a recalled line to the step that needs it. Default: 1,000, or a third of
    the solution for problems too short for that. Raises EvaluationError if the names do not suffice
    for the facts, or ``min_back`` leaves too few steps that can recall.
    """
    needed = steps + 1 + distractors
    if steps < 1 or distractors < 0 or needed > len(NAMES):
        raise EvaluationError(
            f"steps={steps} and distractors={distractors} need {needed} names; "
            f"there are {len(NAMES)}, and steps must be at least 1"
        )
    if min_back is None:
        min_back = min(DEFAULT_MIN_BACK, steps * PLAIN_STEP_TOKENS // 3)
    rng = random.Random(seed)
    names = rng.sample(NAMES, needed)
    nodes, spare = names[: steps + 1], names[steps + 1 :]
    recalls = _choose_recalls(rng, steps, min_back)
    start = rng.randrange(10)
    digits = [rng.randrange(10) for _ in range(steps)]
    facts, lines, value = _write_steps(nodes, start, digits, recalls)
    for name in spare:
        target = names[rng.randrange(needed)]
        adds = names[rng.randrange(needed)] if rng.random() < 1 / 3 else rng.randrange(10)
        facts.append(f"{name} leads to {target} and adds {adds}")
    facts.append(f"{nodes[-1]} ends the chain")
    rng.shuffle(facts)
    answer = f"{nodes[-1]} {value}"
    lines.append(f"{nodes[-1]} ends the chain : the answer is {answer}")
    question = (
        f"Question : start at {nodes[0]} with {start} and follow the chain , "
        "keeping the last digit of every sum ."
    )
    return Problem(
        prompt="\n".join(["Facts", *facts, question, "Steps", ""]),
        solution="\n".join([*lines, ""]),
        answer=answer,
        steps=steps,
        facts=len(facts),
        recalls=tuple(sorted(recalls.items())),
        seed=seed,
    )


def extract_answer(text: str) -> str | None:
    """The last answer stated in a generated text, or None if it states none."""
    answers = _ANSWER.findall(text)
    return answers[-1] if answers else None


def is_correct(problem: Problem, text: str) -> bool:
    """Whether a generated text states exactly the problem's answer."""
    return extract_answer(text) == problem.answer


def first_wrong_line(problem: Problem, text: str) -> int | None:
    """Index of the first generated line that differs from the solution, None if all agree."""
    expected = problem.solution.splitlines()
    written = [line.rstrip() for line in text.splitlines()]
    for index, line in enumerate(expected):
        if index >= len(written) or written[index] != line:
            return index
    return None if len(written) == len(expected) else len(expected)
