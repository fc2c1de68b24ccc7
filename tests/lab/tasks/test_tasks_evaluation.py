"""The evaluation's tasks: samples from seeds, as long as asked for, with exact checkers."""

import re

import pytest

from deltadecode.errors import EvaluationError
from deltadecode.lab.tasks import make_problem
from deltadecode.lab.tasks.registry import TASKS, make_task


def words(text):
    return len(text.split())


@pytest.mark.parametrize("spec", ["chain:steps=12", "needle", "tracking", "perplexity"])
def test_a_seed_makes_one_sample(spec):
    task = make_task(spec)
    first, again, other = (task.sample(seed, words) for seed in (5, 5, 6))
    assert first.prompt == again.prompt != other.prompt


@pytest.mark.parametrize(
    "spec",
    [
        "needle:length=500",
        "needle:kind=multikey:length=900",
        "needle:kind=multivalue:length=300",
        "tracking:length=700",
    ],
)
def test_a_prompt_fills_its_length(spec):
    task = make_task(spec)
    for seed in range(5):
        tokens = words(task.sample(seed, words).prompt)
        assert task.length - 15 <= tokens <= task.length


def needles(prompt):
    return re.findall(r"The code of the (\w+ \w+) is (\d{7})\.", prompt)


def asked(prompt):
    return re.search(r"what is the code of the (\w+ \w+), given", prompt).group(1)


@pytest.mark.parametrize(("kind", "count"), [("single", 1), ("multikey", 5), ("multivalue", 5)])
def test_needles_are_in_the_prompt_and_are_asked_for(kind, count):
    task = make_task(f"needle:kind={kind}:needles=5:length=400")
    for seed in range(5):
        sample = task.sample(seed, words)
        found = needles(sample.prompt)
        assert len(found) == count
        wanted = [code for key, code in found if key == asked(sample.prompt)]
        assert len(wanted) == (5 if kind == "multivalue" else 1)
        assert sample.check(" and ".join(wanted)).score == 1
        wrong = [code for key, code in found if code not in wanted] or ["1"]
        assert sample.check(" ".join(wrong)).score == 0
        assert sample.check(wanted[0]).score == pytest.approx(1 / len(wanted))


def test_needles_lie_everywhere():
    task = make_task("needle:length=400")
    places = []
    for seed in range(60):
        prompt = task.sample(seed, words).prompt
        places.append(prompt.index("The code of the") / len(prompt))
    assert min(places) < 0.15 and max(places) > 0.75


def test_tracking_asks_for_a_whole_chain():
    task = make_task("tracking:length=400:hops=3:chains=2")
    for seed in range(5):
        sample = task.sample(seed, words)
        value = re.search(r"hold the value (\d+)\?", sample.prompt).group(1)
        held = {}
        for name, text in re.findall(r"VAR (\w+) = ([^.]+)\.", sample.prompt):
            held[name] = text if text.isdigit() else held[text.removeprefix("VAR ")]
        right = [name for name, number in held.items() if number == value]
        assert len(held) == 8 and len(right) == 4
        assert sample.check(", ".join(right)).score == 1
        assert sample.check(", ".join(right[:3])).score == pytest.approx(0.75)


def test_chain_is_the_embedded_task():
    sample = make_task("chain:steps=12:distractors=3").sample(4, words)
    problem = make_problem(4, 12, 3)
    assert (sample.prompt, sample.reference) == (problem.prompt, problem.solution)
    assert sample.check(problem.solution).score == 1
    assert sample.check(problem.solution).answer == problem.answer
    assert sample.check(problem.solution.rsplit("\n", 2)[0]).score == 0


def test_perplexity_takes_pieces_of_a_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{i}" for i in range(1000)))
    task = make_task(f"perplexity:prompts=text:length=100:file={file}")
    prompts = [task.sample(seed, words).prompt for seed in (1, 2)]
    assert [words(prompt) for prompt in prompts] == [100, 100]
    assert prompts[0] != prompts[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chian", "unknown task 'chian'; there are chain, needle, tracking, perplexity"),
        ("chain:step=3", "unknown option 'step=3' of task 'chain'; there are steps, distractors"),
        ("chain:steps=x", "steps of task 'chain' must be a number, got 'x'"),
        ("chain:steps=5000", "names"),
        ("needle:needles=600", "needs length >= 64 and 1 to 576 needles, got 4096 and 600"),
        ("needle:kind=double", "must be one of single, multikey, multivalue"),
        ("perplexity:prompts=text:file=/nowhere", "cannot read the text '/nowhere'"),
        ("perplexity:prompts=perplexity", "must be text, chain, needle, tracking"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(text, message):
    with pytest.raises(EvaluationError) as caught:
        make_task(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_task_is_tried():
    assert set(TASKS) == {"chain", "needle", "tracking", "perplexity"}
