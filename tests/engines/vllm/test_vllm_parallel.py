"""Two ranks on the loopback interface: tensor parallel, pipeline parallel."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
from conftest import environment  # of this folder

from deltadecode.lab.tasks import is_correct, make_problem
from deltadecode_vllm import PROPOSER

RANKS = Path(__file__).parents[2] / "gpu" / "rank_worker.py"
# The second of two stages begins with layer 12.
CONFIG = {
    "page_size": 8, "budget_pages": 32, "recent_pages": 4, "delta_layers": [0, 5, 7, 12, 16],
}  # fmt: skip
PROBLEMS = [make_problem(seed, steps=8, distractors=12) for seed in range(2)]
REQUESTS = [{"prompt": problem.prompt} for problem in PROBLEMS]


def run(work, config, **engine):
    job = {"side": "vllm", "config": config, "engine": engine, "rounds": [REQUESTS]}
    return [request["completions"][0] for request in work(job)["rounds"][0]]


def tokens(completions):
    return [each["tokens"] for each in completions]


@pytest.fixture(scope="module")
def one_rank(work):
    return run(work, CONFIG)


def test_planned_kernels_of_two_ranks_keep_the_pages_of_all_heads():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(RANKS), "cpu"], text=True, check=False, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(TRITON_INTERPRET="1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


def test_two_tensor_ranks_that_select_together_give_the_same_tokens(work, one_rank):
    two = run(work, {**CONFIG, "sync_heads": True}, tensor_parallel_size=2)
    assert tokens(two) == tokens(one_rank)


def test_two_tensor_ranks_that_select_together_give_the_same_tokens_of_float8_caches(tiny):
    """Of random weights: what the embedded model writes is the same with keys of any type."""
    one = {
        "model": "llama",
        "config": tiny_runs.SPARSE,
        "prompts": tiny_runs.PROMPTS,
        "max_tokens": 40,
    }
    one |= {"logprobs": None, "engine": {"block_size": 32}}
    float8 = {**one, "engine": {"block_size": 32, "kv_cache_dtype": "fp8"}}
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    two = {
        **float8, "config": {**tiny_runs.SPARSE, "sync_heads": True},
        "engine": {**float8["engine"], **ranks},
    }  # fmt: skip
    found = tiny({"one": one, "float8": float8, "two": two}, fork=True)
    if "FP8 KV cache" in found["float8"].get("error", ""):
        pytest.skip(f"vLLM has no float8 caches here: {found['float8']['error']}")
    assert [run["error"] for run in found.values() if "error" in run] == []
    assert found["two"]["counted"] == found["float8"]["counted"]
    assert found["two"]["tokens"] == found["float8"]["tokens"] != found["one"]["tokens"]


def test_a_worker_in_a_process_of_its_own_gives_tokens_and_counts_of_one_beside(tiny):
    """What operators get by ``--distributed-executor-backend mp`` on one device."""
    tight = {"block_size": 32, "num_gpu_blocks_override": 9, "max_model_len": 192}
    beside = {
        "model": "llama", "config": tiny_runs.SPARSE, "prompts": tiny_runs.PROMPTS,
        "max_tokens": 100, "rounds": 2, "engine": {**tight, "max_num_batched_tokens": 40},
    }  # fmt: skip
    own = {**beside, "engine": {**beside["engine"], "distributed_executor_backend": "mp"}}
    found = tiny({"beside": beside, "own": own}, fork=True)
    assert [run["error"] for run in found.values() if "error" in run] == []
    for what in ("tokens", "counted", "cached", "preempted"):
        assert found["own"][what] == found["beside"][what]
    assert found["beside"]["preempted"] and sum(found["beside"]["cached"])
    # The builder's batches are seen where it runs.
    assert found["beside"]["batches"] and not found["own"]["batches"]


def test_two_tensor_ranks_that_select_alone_give_the_same_answers(work, one_rank):
    two = run(work, CONFIG, tensor_parallel_size=2)
    for problem, here, there in zip(PROBLEMS, one_rank, two, strict=True):
        assert is_correct(problem, here["text"]) and is_correct(problem, there["text"])


def test_rule14_two_tensor_ranks_draft_and_verify_the_tokens_of_stock_vllm(work):
    # So many tokens that drafts pay; they read 16 of some 43 pages.
    problems = [make_problem(seed, steps=14 + seed % 6, distractors=28) for seed in range(8)]
    requests = [{"prompt": each.prompt, "params": {"max_tokens": 24}} for each in problems]
    engine = {"max_model_len": 600}
    stock = work({"side": "vllm", "rounds": [requests], "engine": engine})["rounds"][0]
    engine |= {
        "tensor_parallel_size": 2, "disable_log_stats": False,
        "speculative_config": {
            "method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 4,
        },
    }  # fmt: skip
    config = {"page_size": 8, "budget_pages": 16, "recent_pages": 3}
    found = work({"side": "vllm", "config": config, "rounds": [requests], "engine": engine})
    for ours, theirs in zip(found["rounds"][0], stock, strict=True):
        assert tokens(ours["completions"]) == tokens(theirs["completions"])
    assert found["accepted"] > 0.7 * found["drafted"] > 0


def test_two_pipeline_stages_with_their_own_delta_layers(work, one_rank):
    # On CPUs vLLM makes the tensors that stages hand on in a warm-up, which it leaves out with
    # enforce_eager; this traces the model for it and compiles nothing.
    job = {
        "side": "vllm", "config": CONFIG, "rounds": [REQUESTS],
        "engine": {"pipeline_parallel_size": 2, "enforce_eager": False,
                   "compilation_config": {"mode": 2, "backend": "eager"}},
    }  # fmt: skip
    found = work(job, TORCH_COMPILE_DISABLE="0")
    two = [request["completions"][0] for request in found["rounds"][0]]
    assert tokens(two) == tokens(one_rank)
