"""What is read from a profiler's trace of decode steps."""

import json

import pytest

from benchmarks.e2e.profile import summarize


def event(cat, name, ts, dur, correlation):
    args = {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


@pytest.fixture
def write(tmp_path):
    def to(*events):
        path = tmp_path / "trace.json"
        path.write_text(json.dumps({"traceEvents": [{"ph": "M", "name": "process"}, *events]}))
        return path

    return to


def step(at, number):
    """A graph of three kernels, two of them at once, then a gap of 2 µs; and one kernel outside."""
    launch, outside = 10 * number, 10 * number + 1
    return [
        event("cuda_runtime", "cudaGraphLaunch", at - 5, 1, launch),
        event("kernel", "gemm", at, 4, launch),
        event("kernel", "attention", at + 2, 6, launch),
        event("kernel", "gemm", at + 10, 5, launch),
        event("cuda_runtime", "cudaLaunchKernel", at + 16, 1, outside),
        event("kernel", "sample", at + 20, 3, outside),
        event("gpu_memcpy", "Memcpy DtoH", at + 23, 1, outside + 1),
    ]


def test_full_graphs_are_one_launch_a_step_and_gaps_are_what_no_kernel_covers(write):
    found = summarize(write(*step(100, 1), *step(140, 2)), 2)
    assert found["graph_launches"] == 1
    assert found["kernel_launches"] == 1
    assert (found["kernels_in_graphs"], found["kernels_outside"], found["copies"]) == (3, 1, 1)
    assert found["graph_us"] == 15
    assert found["gaps_in_graph_us"] == 2
    assert found["busy_us"] == 13 + 4
    assert found["period_us"] == 40


def test_kernels_are_listed_by_their_time_and_say_whether_a_graph_ran_them(write):
    kernels = summarize(write(*step(100, 1), *step(140, 2)), 2)["kernels"]
    assert [(k["name"], k["count"], k["us"], k["in_graph"]) for k in kernels] == [
        ("gemm", 2, 9, True),
        ("attention", 1, 6, True),
        ("sample", 1, 3, False),
    ]


def test_a_trace_without_a_gpu_has_nothing(write):
    found = summarize(write(event("cpu_op", "aten::mm", 0, 5, 0)), 3)
    assert found["busy_us"] == found["graph_launches"] == 0
    assert found["kernels"] == [] and found["period_us"] is None
