"""vLLM on a GPU: every CUDA graph mode, sleep, and families of models, as on CPUs.

``pytest -m gpu tests/gpu/test_gpu_vllm_modes.py``
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path
from statistics import median

import pytest
from test_gpu_vllm import BLOCK, CONFIG, PROBLEMS, agreeing, plugin_path, said
from test_gpu_vllm import counted as counted  # fixtures of this module too
from test_gpu_vllm import graphs as graphs
from test_gpu_vllm import pytestmark as pytestmark
from test_gpu_vllm import work as work

WORKER = Path(__file__).parents[1] / "engines" / "vllm" / "tiny_worker.py"
MODES = ["NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"]
PROMPTS = [
    [5 + 7 * (place % 9) % 50 for place in range(60)],
    [3 + 11 * place % 59 for place in range(41)],
]
SPARSE = {
    "page_size": 8, "budget_pages": 3, "recent_pages": 1, "sink_pages": 1,
    "dense_layers": [1], "delta_layers": [3],
}  # fmt: skip
ALL_PAGES = {**SPARSE, "budget_pages": 32}
FAMILIES = ["gpt_oss", "gemma2", "gemma3", "gemma3n", "qwen3_next", "llama4"]


@pytest.mark.parametrize("mode", MODES)
def test_every_graph_mode_gives_the_same(work, graphs, mode):
    engine = {"compilation_config": {"cudagraph_mode": mode}}
    # Sums of bfloat16 in another order may turn one near-tie.
    assert agreeing(graphs, work(config=CONFIG, engine=engine)[0]) >= 20


# Prompts of 414 to 502 tokens grow to 809 and more, most of them beyond 900: the cache holds eight
# when they come, and five at their end.
CROWDED = {
    "max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": 1280,
    "block_size": BLOCK, "num_gpu_blocks_override": 300, "enable_prefix_caching": True,
    "disable_log_stats": False,
}  # fmt: skip
# Up to the largest batch, so that chunks of prompts beside decode rows come from graphs, too.
SIZES = [1, 2, 4, 8, 16, 32, 64, 128]


@pytest.mark.parametrize("mode", MODES)
def test_preemption_in_every_graph_mode(counted, graphs, mode):
    requests = [{"prompt": problem.prompt} for problem in PROBLEMS]
    captured = {"cudagraph_mode": mode, "cudagraph_capture_sizes": SIZES}
    engine = {**CROWDED, "compilation_config": captured}
    # The other way round the second time: what came last may be cached still.
    found = counted(config=CONFIG, engine=engine, rounds=[requests, requests[::-1]])
    first, again = found["rounds"]
    assert found["preempted"] >= 10
    assert sum(each["cached"] for each in again) > 0
    # What a preempted sequence has written comes again as a prompt, in full attention (R1), which
    # may turn a near-tie, as sums of bfloat16 in another order may.
    assert agreeing(graphs, first) >= 19
    assert agreeing(graphs, again[::-1]) >= 19


def test_an_engine_that_has_slept_gives_the_same(work):
    """Its cache is gone, and so is what else was allocated with it.

    Rows that a stale flag takes for prompts read everything, which shows where a plan starves.
    """
    requests = [{"prompt": p.prompt, "params": {"max_tokens": 60}} for p in PROBLEMS]
    starved = {"page_size": 8, "budget_pages": 2, "recent_pages": 1, "delta_layers": [0]}
    first, *others = work(
        config=starved, engine={"enable_sleep_mode": True}, sleep=True,
        rounds=[requests, requests, requests],
    )  # fmt: skip
    for found in others:
        assert agreeing(first, found) >= 19


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Runs of tiny_worker.py, all at once: named runs -> what each of them gave, by name.

    Each has a process, a folder and a compilation cache of its own.
    """
    path = plugin_path(tmp_path_factory.mktemp("plugin"))

    def run(job, folder):
        common = {
            "prompts": PROMPTS, "max_tokens": 40,
            "engine": {
                "dtype": "bfloat16", "enforce_eager": False, "gpu_memory_utilization": 0.1,
                "kv_cache_memory_bytes": 2**28,
            },
        }  # fmt: skip
        (folder / "job.json").write_text(
            json.dumps({"folder": str(folder), "runs": [{**common, **job}]})
        )
        own = {
            "PYTHONPATH": path, "VLLM_CACHE_ROOT": str(folder / "cache"),
            "VLLM_LOGGING_LEVEL": "WARNING",
            # Else the compiler pads narrow weights, such as a router's, where it takes less time in
            # one trial; sums then round otherwise, and a token goes to another expert.
            "TORCHINDUCTOR_SHAPE_PADDING": "0",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, str(WORKER), "job.json", "out.json"], cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            env={**os.environ, **own},
        )  # fmt: skip
        assert done.returncode == 0, said(done.stdout)
        (found,) = json.loads((folder / "out.json").read_text())
        return found

    def run_all(**jobs):
        folders = [tmp_path_factory.mktemp("tiny") for _ in jobs]
        with ThreadPoolExecutor(len(jobs)) as threads:
            return dict(zip(jobs, threads.map(run, jobs.values(), folders), strict=True))

    return run_all


def first_tokens(run):
    """Where sums of bfloat16 turn a near-tie, all that follows differs."""
    assert "error" not in run, run["error"]
    return [tokens[:8] for tokens in run["tokens"]]


def run_or_skip(tiny, **jobs):
    runs = tiny(**jobs)
    if "error" in runs["stock"]:
        pytest.skip(f"stock vLLM does not run it here: {runs['stock']['error'][:200]}")
    return runs


def apart(run, stock):
    """How far the logprobs of decode steps are from stock's, the median, while tokens agree.

    Weights are random, so that near-ties are common: in bfloat16 no token has to be the same. The
    first one is, which comes of the prompt.
    """
    assert "error" not in run, run["error"]
    found = []
    for ours, theirs, some, others in zip(
        run["tokens"], stock["tokens"], run["logprobs"], stock["logprobs"], strict=True
    ):
        assert ours[0] == theirs[0]
        for step in range(1, 8):
            if ours[:step] == theirs[:step]:
                both = set(some[step]) & set(others[step])
                found.append(max((abs(some[step][t] - others[step][t]) for t in both), default=inf))
    return median(found)


@pytest.mark.parametrize("model", FAMILIES)
def test_with_every_page_in_the_budget_a_family_is_near_stock_vllm(tiny, model):
    runs = run_or_skip(
        tiny,
        stock={"model": model},
        everything={"model": model, "config": ALL_PAGES},
        sparse={"model": model, "config": SPARSE},
    )
    near, far = (apart(runs[name], runs["stock"]) for name in ("everything", "sparse"))
    assert near < far / 4
    attended, full = runs["everything"]["counted"]
    assert attended == full > runs["sparse"]["counted"][0] > 0


def test_an_adapter_with_every_page_in_the_budget_is_stock_vllm(tiny):
    config = {**ALL_PAGES, "dense_layers": [0], "delta_layers": [1]}
    adapted = {"model": "llama", "lora": True}
    runs = tiny(stock=adapted, everything={**adapted, "config": config}, plain={"model": "llama"})
    stock = first_tokens(runs["stock"])
    assert first_tokens(runs["everything"]) == stock != first_tokens(runs["plain"])


def test_float8_scales_of_a_checkpoint(tiny):
    """Written into the cache by vLLM, and read by both."""
    scaled = {"model": "llama", "float8": [0.05, 0.03], "prompts": [PROMPTS[0]]}
    config = {**ALL_PAGES, "dense_layers": [0], "delta_layers": [1]}
    runs = run_or_skip(
        tiny,
        stock=scaled,
        everything={**scaled, "config": config},
        sparse={**scaled, "config": {**config, "budget_pages": 3}},
    )
    stock, everything = runs["stock"], runs["everything"]
    assert first_tokens(everything)[0][:4] == first_tokens(stock)[0][:4]
    for ours, theirs in zip(everything["logprobs"][0][:3], stock["logprobs"][0][:3], strict=True):
        for token in set(ours) & set(theirs):
            # Stock attention rounds softmax weights to float8 as well.
            assert ours[token] == pytest.approx(theirs[token], abs=0.3)
    assert runs["sparse"]["counted"][0] < runs["sparse"]["counted"][1]


def test_heads_that_the_kernels_do_not_take(tiny):
    wide = {"model": "gemma4_wide"}
    runs = run_or_skip(
        tiny,
        stock=wide,
        refused={**wide, "config": ALL_PAGES},
        told={**wide, "config": {**ALL_PAGES, "on_unsupported": "stock"}},
    )
    words = 'got 512 and 2; on_unsupported="stock" serves it with stock attention'
    assert words in runs["refused"]["error"]
    assert first_tokens(runs["told"]) == first_tokens(runs["stock"])
