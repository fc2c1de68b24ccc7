"""The evaluation's tasks: samples from seeds, as long as asked for, with exact checkers."""

import re

import pytest

from deltadecode.errors import EvaluationError
from deltadecode.lab.tasks import make_problem
from deltadecode.lab.tasks.registry import TASKS, make_task


def words(text):
    return len(text.split())


@pytest.mark.parametrize(
    "spec", ["chain:steps=12", "needle", "tracking", "text:stdlib-docs", "perplexity"]
)
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
        ("chian", "unknown task 'chian'; there are chain, needle, tracking, text, perplexity"),
        ("chain:step=3", "unknown option 'step=3' of task 'chain'; there are steps, distractors"),
        ("chain:steps=x", "steps of task 'chain' must be a number, got 'x'"),
        ("chain:steps=5000", "names"),
        ("needle:needles=600", "needs length >= 64 and 1 to 576 needles, got 4096 and 600"),
        ("needle:kind=double", "must be one of single, multikey, multivalue"),
        ("perplexity:prompts=text:file=/nowhere", "cannot read the text '/nowhere'"),
        ("text", "needs either file=... or a source, stdlib-docs or stdlib-code"),
        ("text:stdlib-docs:file=a", "needs either file=... or a source"),
        ("text:wiki", "unknown source 'wiki' of task 'text'; there are stdlib-docs, stdlib-code"),
        ("text:file=/no:where.txt", "cannot read the text '/no:where.txt': No such file"),
        ("text:file=/", "cannot read the text '/': Is a directory"),
        ("text:stdlib-docs:context=0", "needs context >= 1"),
        ("text:stdlib-docs:tokens=x", "tokens of task 'text' must be a number, got 'x'"),
        ("text:stdlib-docs:tokens", "unknown option 'tokens'"),
        ("perplexity:prompts=perplexity", "must be text, chain, needle, tracking"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(text, message):
    with pytest.raises(EvaluationError) as caught:
        make_task(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


class Letters:
    """A tokenizer of one token a letter, which begins texts with 7."""

    bos_token_id = 7

    def __call__(self, text, add_special_tokens=True, **options):
        ids = [*([7] if add_special_tokens else []), *map(ord, text)]
        return type("Encoding", (), {"input_ids": ids})


def test_pieces_of_a_text_lie_apart_while_there_is_room(tmp_path):
    file = tmp_path / "a text: with=signs.txt"
    file.write_text("".join(map(chr, range(1000, 1100))), encoding="utf-8")
    task = make_task(f"text:context=10:file={file}:tokens=5")
    assert (task.file, task.context, task.tokens, task.needed) == (str(file), 10, 5, 16)
    pieces = task.pieces(Letters(), range(100, 110))
    assert all(len(piece) == 16 and piece[0] == 7 for piece in pieces)
    assert all(piece[1:] == list(range(piece[1], piece[1] + 15)) for piece in pieces)
    first = {token for piece in pieces[:6] for token in piece[1:]}
    assert len(first) == 6 * 15
    assert len({piece[1] for piece in pieces}) == 10
    assert pieces == task.pieces(Letters(), range(100, 110))
    with pytest.raises(EvaluationError, match="has 101 tokens, and context"):
        make_task(f"text:file={file}:context=98:tokens=5").pieces(Letters(), [0])


@pytest.mark.parametrize("source", ["stdlib-docs", "stdlib-code"])
def test_python_has_texts_of_its_own(source):
    task = make_task(f"text:{source}")
    assert len(task._text) > 300_000 and task.digest == make_task(f"text:{source}").digest


def test_a_text_that_is_none_is_refused(tmp_path):
    (tmp_path / "image").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(EvaluationError, match="is no text in UTF-8"):
        make_task(f"text:file={tmp_path / 'image'}")


def test_every_task_is_tried():
    assert set(TASKS) == {"chain", "needle", "tracking", "text", "perplexity"}
