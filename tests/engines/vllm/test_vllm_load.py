"""The load benchmark and the soak, with real engines of tiny models."""

import json
import os
import subprocess
import sys

import pytest
from conftest import environment  # of this folder

from benchmarks.processes import ROOT
from benchmarks.serve.options import make_options
from benchmarks.serve.run import check_facts, run_file, write_json
from benchmarks.serve.workloads import Rate


@pytest.fixture
def benchmark(tmp_path):
    """Run a benchmark in a process of its own, and give its result."""

    def run(name, *arguments, **more):
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments), "--json"],
            capture_output=True, text=True, check=False, timeout=900,
            env=environment(PYTHONPATH=path, DELTADECODE_COMMIT="test", **more),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return {**json.loads(done.stdout), "said": done.stderr}

    return run


def test_a_server_with_delta_under_load(benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTADECODE_COMMIT", "test")
    sizes = dict(input_len=100, output_len=16, prefix_len=300, requests=6, concurrency=3)
    options = make_options(
        shape="tiny", names=["shared-prefix"], rates=["inf", "0.5x"], raw=tmp_path, **sizes
    )
    # What stock would have served; its server is the same code without three arguments.
    check_facts(options)
    stock = {
        "tok_s": 100.0, "requests_s": 20.0, "preemptions": 0,
        **{f"{t}_p{p}": 1.0 for t in ("ttft", "tpot", "itl") for p in (50, 99)},
    }  # fmt: skip
    (workload,) = options.workloads
    for rate, seconds in ((Rate(float("inf")), None), (Rate(0.5, of_stock=True), 10.0)):
        run = {"workload": vars(workload), "rate": str(rate), "per_second": seconds, **stock}
        write_json(run_file(tmp_path, "stock", workload, rate), run)
    words = [word for name, n in sizes.items() for word in (f"--{name.replace('_', '-')}", n)]
    result = benchmark(
        "serve", "--shape", "tiny", "--workload", "shared-prefix", "--rate", "inf",
        "--rate", "0.5x", "--raw", tmp_path, *words,
        TORCH_COMPILE_DISABLE="0",  # one server as users have it
    )  # fmt: skip
    assert result["unfinished"] == [], result["said"]
    assert [row["per_second"] for row in result["rows"]] == [None, 10.0]
    for row in result["rows"]:
        assert row["output_tokens_ours"] == 6 * 16
        assert row["preemptions_ours"] == 0 and row["prefix_hits_ours"] > 0.3
        # 400 tokens and more in 4 pages of 16, in three layers of six.
        assert 0.3 < row["attended_ours"] < 0.7
    assert result["engines"]["DELTA"]["kv_tokens"] > 1000
    assert result["engines"]["DELTA"]["jit_compilations"] == 0
    log = (tmp_path / "DELTA-server.log").read_text()
    assert "deltadecode: dense layers 0, Δ-layers 1 3" in log


def test_200_requests_with_a_third_aborted_leave_nothing_behind(benchmark):
    result = benchmark(
        "soak", "--requests", 200, "--prompts", 16, "--output-len", 24, "--blocks", 28
    )
    (row,) = result["rows"]
    assert result["failures"] == []
    assert row["started"] == 200 and 40 < row["aborted"] < 90
    assert row["tokens"] > 500 and row["near_ties"] == 0
    assert row["preemptions"] > 0
