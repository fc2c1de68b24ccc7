"""A real engine of the end-to-end benchmark, driven step by step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.e2e.measure import WORKER
from benchmarks.e2e.run import make_options
from benchmarks.processes import environment

DRAWING = (sys.executable, str(Path(__file__).with_name("drawing_engine.py")))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Answer to every command of every workload, of stock vLLM and the tiny shape."""
    return run(tmp_path_factory.mktemp("tiny"), "stock")


def run(folder, side, worker=WORKER, **options):
    setup = make_options(
        shape="tiny", points=["4:200"], steps=8, rounds=2, memory_share=0.1, **options
    )
    model = setup.shape.write(folder)
    todo = [setup.spec(side, model)]
    for one in setup.workloads:
        todo += [*one.opening(), *[one.measuring()] * one.rounds, *one.closing()]
    done = subprocess.run(
        worker,
        input="".join(json.dumps(each) + "\n" for each in todo),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**environment(), "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [*zip(todo[1:], lines[1:], strict=True)], lines[0]["ready"]


def test_it_says_what_runs(answers):
    _, ready = answers
    assert ready["kv_tokens"] > 1000
    assert len(ready["backends"]) == 1
    assert ready["cudagraph_mode"] == "NONE"


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
    (found,) = [a["done"] for c, a in done if c["do"] == "headline"]
    assert len(found["steps"]) >= 196
    assert sum(found["steps"]) == pytest.approx(found["seconds"], rel=0.01)


def test_steps_with_drafts_verify_them(tmp_path):
    done, _ = run(tmp_path, "DELTA", kinds=["step"], drafts=3)
    steps = [a["done"] for c, a in done if c["do"] == "steps" and c["steps"] == 8]
    assert len(steps) == 3  # and one before what is timed
    for answer in steps:
        assert len(answer["seconds"]) == 8
        assert answer["verified"] == 8 * 4 * 3


def test_both_sides_accept_as_many_drafts_as_are_drawn(tmp_path):
    """1 + 0.69 + 0.69² + 0.69³ tokens a step: 2.5."""
    given = {}
    for side in ("stock", "DELTA"):
        done, ready = run(tmp_path, side, DRAWING, kinds=["step"], drafts=3, acceptance=0.69)
        assert ready["backends"] == ["CUSTOM" if side == "DELTA" else "CPU_ATTN"]
        steps = [a["done"] for c, a in done if c["do"] == "steps"]
        assert [each["verified"] for each in steps] == [8 * 4 * 3] * 3
        given[side] = [each["tokens"] for each in steps]
    assert given["stock"] == given["DELTA"]
    assert 2.1 < sum(given["stock"]) / 3 < 2.9


def test_ranks_run_the_plan(tmp_path):
    done, ready = run(tmp_path, "DELTA", kinds=["step"], tensor_parallel=2, sync_heads=True)
    assert ready["tensor_parallel"] == 2
    assert ready["backends"] == ["CUSTOM"]
    assert [len(a["done"]["seconds"]) for c, a in done if c["do"] == "steps"] == [8, 8, 8]


@pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM has no float8 caches on such CPUs"
)
def test_steps_with_a_float8_cache(tmp_path):
    done, ready = run(tmp_path, "DELTA", kinds=["step"], kv_cache_dtype="fp8")
    assert ready["backends"] == ["CUSTOM"]
    assert [len(a["done"]["seconds"]) for c, a in done if c["do"] == "steps"] == [8, 8, 8]
