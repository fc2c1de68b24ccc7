"""Chain problems: what the generator promises, checked by an independent solver of the text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltadecode.lab.tasks import (
    extract_answer,
    first_wrong_line,
    is_correct,
    make_problem,
)
from deltadecode.lab.tasks.vocabulary import NAMES, TOKENS, encode


def solve(prompt: str) -> str:
    """Answer of a problem, from its text alone."""
    facts = dict(re.findall(r"^(\w+) leads to (\w+ and adds \w+)$", prompt, flags=re.M))
    (end,) = re.findall(r"^(\w+) ends the chain$", prompt, flags=re.M)
    node, start = re.search(r"start at (\w+) with (\d)", prompt).groups()
    value, held = int(start), {}
    while node != end:
        node, _, _, added = facts[node].split(" ")
        value = (value + (int(added) if added.isdigit() else held[added])) % 10
        held[node] = value
    return f"{end} {value}"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**62), st.integers(1, 240), st.integers(0, 60))
def test_answer_agrees_with_a_solver_that_reads_the_text(seed, steps, distractors):
    problem = make_problem(seed, steps, distractors)
    assert solve(problem.prompt) == problem.answer == extract_answer(problem.solution)
    assert is_correct(problem, problem.solution)
    assert first_wrong_line(problem, problem.solution) is None
    assert problem.facts == steps + distractors + 1 == len(problem.prompt.splitlines()) - 3


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**62))
def test_default_problem_punishes_forgetting(seed):
    """At least 150 facts, 200 steps, 4,000 tokens; a third recall a line 1,000 tokens back."""
    problem = make_problem(seed)
    lines = problem.solution.splitlines(keepends=True)
    tokens = [len(encode(line)) for line in lines]
    starts = [sum(tokens[:i]) for i in range(len(tokens))]
    assert problem.facts >= 150
    assert problem.steps == len(lines) - 1 >= 200
    assert sum(tokens) >= 4000
    assert 3 * len(problem.recalls) >= problem.steps
    for step, line in problem.recalls:
        assert starts[step] - starts[line + 1] >= 1000
        source = lines[line].split(" so ")[1].split(" ")[0]
        assert f"adds {source} : {source} holds" in lines[step]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**62), st.data())
def test_every_fact_and_recall_on_the_way_changes_the_answer(seed, data):
    problem = make_problem(seed, steps=30, distractors=5)
    step = data.draw(st.integers(0, 29))
    line = problem.solution.splitlines()[step]
    fact = line.split(" : ")[0]
    node, following = fact.split(" ")[0], fact.split(" ")[3]
    prompt = re.sub(
        rf"^{node} leads to {following} and adds \w+$",
        f"{node} leads to {following} and adds X",
        problem.prompt,
        flags=re.M,
    )
    old = int(line.split(" + ")[1].split(" ")[0])
    changed = prompt.replace("adds X", f"adds {(old + 1) % 10}")
    assert solve(changed) != problem.answer or any(
        problem.recalls and step < later for later, _ in problem.recalls
    )


def test_same_seed_same_problem_other_seed_another():
    assert make_problem(7) == make_problem(7)
    assert make_problem(7).prompt != make_problem(8).prompt


def test_wrong_texts_are_wrong():
    problem = make_problem(1, steps=5)
    node, digit = problem.answer.split(" ")
    for text in ("", "the answer is", f"the answer is {node}", f"the answer is {node} {digit}1"):
        assert not is_correct(problem, text)
    other = f"the answer is {node} {(int(digit) + 1) % 10}"
    assert not is_correct(problem, problem.solution + other)
    lines = problem.solution.splitlines()
    lines[2] = lines[2].replace("leads", "adds")
    assert first_wrong_line(problem, "\n".join(lines)) == 2
    assert first_wrong_line(problem, "\n".join(lines[:2])) == 2
    assert first_wrong_line(problem, problem.solution + "more\n") == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"steps": 0}, "steps=0"),
        ({"distractors": -1}, "distractors=-1"),
        ({"steps": 600}, "steps=600"),
        ({"steps": 20, "min_back": 1000}, "min_back=1000"),
    ],
)
def test_impossible_sizes_are_refused_in_one_line(arguments, said):
    with pytest.raises(ValueError, match=said) as caught:
        make_problem(0, **arguments)
    assert "\n" not in str(caught.value)


def test_vocabulary_has_no_word_twice():
    assert len(set(TOKENS)) == len(TOKENS)
    assert len(set(NAMES)) == len(NAMES) > 400
