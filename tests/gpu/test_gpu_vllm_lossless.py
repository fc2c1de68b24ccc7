"""Lossless mode of vLLM on a GPU: drafts from captured graphs, and the text of full attention.

``pytest -m gpu tests/gpu/test_gpu_vllm_lossless.py``
"""

import pytest
from test_gpu_vllm import ENGINE, PROBLEMS, agreeing, plugin_path, run_worker
from test_gpu_vllm import pytestmark as pytestmark

from deltadecode_vllm import PROPOSER

# Prompts of 350 to 370 tokens; drafts read 24 of their 46 pages and more.
CONFIG = {"page_size": 8, "budget_pages": 24, "recent_pages": 4, "min_tokens": 0}
DRAFTING = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 4}
REQUESTS = [{"prompt": each.prompt} for each in PROBLEMS]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    path = plugin_path(folder)

    def run(rounds=(REQUESTS,), **job):
        engine = {**ENGINE, "disable_log_stats": False, **job.pop("engine", {})}
        if "config" in job:
            engine["speculative_config"] = {**DRAFTING, **engine.get("speculative_config", {})}
        given = {"side": "vllm", "rounds": list(rounds), "engine": engine, **job}
        found = run_worker(folder, path, given)
        found["rounds"] = [
            [request["completions"][0] for request in round_] for round_ in found["rounds"]
        ]
        return found

    return run


@pytest.fixture(scope="module")
def stock(work):
    return work()["rounds"][0]


@pytest.fixture(scope="module")
def graphs(work):
    return work(config=CONFIG)


def test_rule14_greedy_output_is_that_of_stock_vllm(stock, graphs):
    # Sums of bfloat16 in another order may turn a few near-ties.
    assert agreeing(stock, graphs["rounds"][0]) >= 18
    assert graphs["accepted"] > 0.8 * graphs["drafted"] > 0
    assert graphs["async_scheduling"]


def test_steps_without_drafts_come_from_graphs_before_those_with_some(work, stock):
    # Rows of 350 to 370 tokens decode, and draft from 400 on.
    found = work(config={**CONFIG, "min_tokens": 400}, engine={"async_scheduling": False})
    assert agreeing(stock, found["rounds"][0]) >= 18
    assert found["accepted"] > 0.8 * found["drafted"] > 0
    assert not found["async_scheduling"]


def test_graphs_draft_what_eager_steps_draft(work, graphs):
    eager = work(config=CONFIG, engine={"enforce_eager": True})
    assert agreeing(eager["rounds"][0], graphs["rounds"][0]) >= 18
    shares = [found["accepted"] / found["drafted"] for found in (eager, graphs)]
    assert abs(shares[0] - shares[1]) < 0.03


def test_mixed_batches_chunks_and_prefix_hits(work, stock):
    engine = {"max_num_batched_tokens": 133, "max_num_seqs": 6, "enable_prefix_caching": True}
    found = work(config=CONFIG, engine=engine, rounds=(REQUESTS, REQUESTS))
    for round_ in found["rounds"]:
        assert agreeing(stock, round_) >= 18
    assert found["accepted"] > 0.75 * found["drafted"]


def test_sixteen_drafts_in_a_float8_cache(work):
    float8 = {"kv_cache_dtype": "fp8"}
    stock = work(engine=float8)["rounds"][0]
    found = work(
        config=CONFIG, engine={**float8, "speculative_config": {"num_speculative_tokens": 16}}
    )
    # Stock attention rounds softmax weights to float8 as well, which turns near-ties.
    assert agreeing(stock, found["rounds"][0]) >= 13
    assert found["accepted"] > 0.4 * found["drafted"]
