"""``deltadecode demo``: both sides of one problem, and a step of a larger model."""

import json
import subprocess
import sys

import pytest
from cli_models import LAYERS, make_model
from rich.console import Console

from deltadecode.cli import demo_workers, loading
from deltadecode.cli.demo import summary
from deltadecode.lab.tasks import make_problem, model_path
from deltadecode.lab.tasks.tokenizer import build_tokenizer


@pytest.fixture
def small_demo(monkeypatch, tmp_path, tiny_shape):
    """The demo on small random models; what the first one writes is no answer."""
    folder = make_model(tmp_path / "solver", positions=2048)
    monkeypatch.setitem(loading.NAMED_MODELS, "embedded", lambda: folder)
    larger = {"context": 2000, "shape": tiny_shape.to_dict(), "pairs": 3}
    monkeypatch.setattr("deltadecode.cli.demo.LARGER", larger)
    return folder


KEYS = {
    "correct", "same_answer", "tokens_generated", "attended_fraction", "seconds_full",
    "seconds_delta", "answer", "expected",
}  # fmt: skip


def test_demo_json_is_one_object(run, small_demo):
    code, out, err = run("demo", "--seed", "7", "--steps", "6", "--json")
    assert code == 0
    assert out.count("\n") == 1
    found = json.loads(out)
    assert set(found) == KEYS
    problem = make_problem(7, steps=6)
    assert "seed 7" in err
    assert found["expected"] == problem.answer
    assert (found["answer"], found["correct"], found["same_answer"]) == (None, False, False)
    tokenizer = build_tokenizer(2048)
    assert found["tokens_generated"] == len(tokenizer(problem.solution).input_ids) + 32
    assert 0 < found["attended_fraction"] <= 1
    assert found["seconds_full"] > 0 and found["seconds_delta"] > 0


def test_both_sides_are_counted_and_a_step_is_timed(small_demo, tiny_shape):
    task = {"kind": "problem", "model": str(small_demo), "seed": 7, "steps": 6}
    larger = {"context": 2000, "shape": tiny_shape.to_dict(), "pairs": 3}
    full, delta, step = demo_workers.run(task, larger, Console(stderr=True))
    problem, tokenizer = make_problem(7, steps=6), build_tokenizer(2048)
    written = len(tokenizer(problem.solution).input_ids) + 32
    prompt = len(tokenizer(problem.prompt).input_ids)
    assert delta["prompt_tokens"] == prompt
    assert delta["tokens"] == full["tokens"] == written
    assert delta["full_tokens"] == LAYERS * sum(range(prompt + 1, prompt + written))
    assert full["attended_tokens"] == full["full_tokens"] == delta["full_tokens"]
    assert summary(full, delta)["attended_fraction"] == (
        delta["attended_tokens"] / delta["full_tokens"]
    )
    for seconds in (full["seconds"], delta["seconds"], step["step_ms_full"], step["step_ms_delta"]):
        assert seconds > 0


def test_demo_solves_a_short_problem_with_the_shipped_model(run, monkeypatch, small_demo):
    monkeypatch.setitem(loading.NAMED_MODELS, "embedded", model_path)
    code, out, _ = run("demo", "--seed", "1", "--steps", "15", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["correct"] and found["same_answer"]
    assert found["answer"] == found["expected"] == make_problem(1, steps=15).answer
    assert found["attended_fraction"] < 1


def test_demo_shows_both_sides(run, small_demo):
    code, out, err = run("demo", "--steps", "3")
    assert code == 0
    for shown in (
        "full attention",
        "DELTA",
        "right?",
        "attended",
        "seconds",
        "2,000 tokens",
    ):
        assert shown in out
    assert "…" not in out
    assert "seed" in err


def test_demo_of_no_steps_or_too_many_is_refused(refused):
    assert "0" in refused("demo", "--steps", "0")
    assert "100000" in refused("demo", "--steps", "100000")


def test_demo_that_fails_ends_with_1_and_one_line(run, small_demo):
    (small_demo / "model.safetensors").unlink()
    code, out, err = run("demo", "--seed", "1", "--steps", "3")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("deltadecode: error: RuntimeError: decoding with ")
    assert "Traceback" not in err


def test_demo_whose_step_cannot_be_timed_says_so(run, small_demo, monkeypatch, tiny_shape):
    shallow = {**tiny_shape.to_dict(), "num_hidden_layers": 4, "layer_types": None}
    larger = {"context": 20, "shape": shallow, "pairs": 2}
    monkeypatch.setattr("deltadecode.cli.demo.LARGER", larger)
    code, out, err = run("demo", "--steps", "3")
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("deltadecode: error: RuntimeError: timing a step failed: DeltaConfigErr")


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("ready", "decoding with DELTA failed: ValueError: too small"),
        ("done", "timing a step failed: ValueError: too small"),
    ],
)
def test_a_failure_is_told_though_the_other_side_is_not_so_far(monkeypatch, last, message):
    side = """if 1:
        import json, sys, time
        last, delta = sys.argv[1], json.loads(sys.argv[2])["delta"]
        say = lambda **message: print(json.dumps(message), flush=True)
        for part in ("ready", "done"):
            if part == last and not delta:
                time.sleep(60)
            if part == last == "ready":
                break
            say(**{part: 1})
            if part != last:
                sys.stdin.readline()
        say(error="ValueError: too small")
    """
    popen = subprocess.Popen

    def start(command, **options):
        return popen([sys.executable, "-c", side, last, command[-1]], **options)

    monkeypatch.setattr(demo_workers.subprocess, "Popen", start)
    with pytest.raises(RuntimeError, match=message):
        demo_workers.run({}, {"pairs": 1}, Console(stderr=True))
