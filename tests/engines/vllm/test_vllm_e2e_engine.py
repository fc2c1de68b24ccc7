"""A real engine of the end-to-end benchmark, driven step by step."""

import json
import subprocess

import pytest
import torch

from benchmarks.e2e.measure import WORKER
from benchmarks.e2e.run import make_options
from benchmarks.processes import environment


def commands(folder, side, **options):
    """What a process of that side is asked, of every workload and the tiny shape."""
    setup = make_options(
        shape="tiny", points=["4:200"], steps=8, rounds=2, memory_share=0.1, **options
    )
    asked = [setup.spec(side, setup.shape.write(folder))]
    for one in setup.workloads:
        asked += [*one.opening(), *[one.measuring()] * one.rounds, *one.closing()]
    return asked


def lines_of(asked):
    return "".join(json.dumps(each) + "\n" for each in asked)


def pairs(asked, said):
    """Every command with its answer, and what the engine says it is."""
    answers = [json.loads(line) for line in said.splitlines()]
    return [*zip(asked[1:], answers[1:], strict=True)], answers[0]["ready"]


@pytest.fixture(scope="module")
def run(run_script, tmp_path_factory):
    """Run an engine of a side in a fork, with options of the benchmark."""

    def start(side, *arguments, **options):
        folder = tmp_path_factory.mktemp("e2e")
        asked = commands(folder, side, **options)
        (folder / "commands").write_text(lines_of(asked))
        run_script("e2e_worker.py", "commands", "answers", *arguments, folder=folder)
        return pairs(asked, (folder / "answers").read_text())

    return start


@pytest.fixture(scope="module")
def answers(run):
    """Answer to every command of every workload, of stock vLLM."""
    return run("stock")


def test_it_says_what_runs(answers):
    _, ready = answers
    assert ready["kv_tokens"] > 1000
    assert len(ready["backends"]) == 1
    assert ready["cudagraph_mode"] == "NONE"
    assert ready["executor"] == "uni"


def test_every_command_is_done_and_nothing_is_preempted(answers):
    done, _ = answers
    assert all(answer["done"]["preemptions"] == 0 for _, answer in done)


def test_steps_are_single_decode_steps_that_end_at_the_context(answers):
    done, _ = answers
    steps = [(c, a["done"]) for c, a in done if c["do"] == "steps"]
    for command, answer in steps:
        assert len(answer["seconds"]) == command["steps"]
        assert answer["to"] - answer["from"] >= command["steps"]
    assert max(answer["to"] for _, answer in steps) in range(200, 205)


def test_a_headline_has_a_time_for_every_token(answers):
    done, _ = answers
    found = [a["done"] for c, a in done if c["do"] == "headline"]
    assert len(found) == 2
    for each in found:
        assert len(each["steps"]) >= 196
        assert sum(each["steps"]) == pytest.approx(each["seconds"], rel=0.01)


def test_steps_with_drafts_verify_them(run):
    done, _ = run("DELTA", kinds=["step"], drafts=3)
    steps = [a["done"] for c, a in done if c["do"] == "steps" and c["steps"] == 8]
    assert len(steps) == 3  # and one before what is timed
    for answer in steps:
        assert len(answer["seconds"]) == 8
        assert answer["verified"] == 8 * 4 * 3


def test_both_sides_accept_as_many_drafts_as_are_drawn(run):
    """1 + 0.69 + 0.69² + 0.69³ tokens a step: 2.5."""
    given = {}
    for side in ("stock", "DELTA"):
        done, ready = run(side, "draw", kinds=["step"], drafts=3, acceptance=0.69)
        assert ready["backends"] == ["CUSTOM" if side == "DELTA" else "CPU_ATTN"]
        steps = [a["done"] for c, a in done if c["do"] == "steps"]
        assert [each["verified"] for each in steps] == [8 * 4 * 3] * 3
        given[side] = [each["tokens"] for each in steps]
    assert given["stock"] == given["DELTA"]
    assert 2.1 < sum(given["stock"]) / 3 < 2.9


@pytest.mark.parametrize(
    ("options", "ranks"),
    [({"tensor_parallel": 2, "sync_heads": True}, 2), ({"worker_process": True}, 1)],
    ids=["two ranks", "one"],
)
def test_workers_in_processes_of_their_own_run_the_plan(tmp_path, options, ranks):
    """As the benchmark starts it, each in a process that is no fork."""
    asked = commands(tmp_path, "DELTA", kinds=["step"], **options)
    started = subprocess.run(
        WORKER,
        input=lines_of(asked),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**environment(), "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )
    done, ready = pairs(asked, started.stdout)
    assert (ready["tensor_parallel"], ready["executor"]) == (ranks, "mp")
    assert ready["backends"] == ["CUSTOM"]
    steps = [a["done"] for c, a in done if c["do"] == "steps"]
    assert [len(each["seconds"]) for each in steps] == [8, 8, 8]
    # The engine's process does little more than to wait for them.
    assert all(each["waited"] for each in steps)


@pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM has no float8 caches on such CPUs"
)
def test_steps_with_a_float8_cache(run):
    done, ready = run("DELTA", kinds=["step"], kv_cache_dtype="fp8")
    assert ready["backends"] == ["CUSTOM"]
    assert [len(a["done"]["seconds"]) for c, a in done if c["do"] == "steps"] == [8, 8, 8]
