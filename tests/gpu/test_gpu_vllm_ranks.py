"""vLLM on two GPUs: tensor and pipeline parallel, with full CUDA graphs.

``pytest -m gpu tests/gpu/test_gpu_vllm_ranks.py``
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_gpu_vllm import FLOAT8, agreeing
from test_gpu_vllm import pytestmark as needs_vllm
from test_gpu_vllm import work as work  # a fixture of this module too

import deltadecode
from benchmarks import multicast
from deltadecode.lab.tasks import is_correct, make_problem

pytestmark = [
    *needs_vllm,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
WORKER = Path(__file__).parent / "rank_worker.py"
# The second of two stages begins with layer 12.
CONFIG = {
    "page_size": 8, "budget_pages": 32, "recent_pages": 4, "delta_layers": [0, 5, 7, 12, 16],
}  # fmt: skip
PROBLEMS = [make_problem(seed, steps=8, distractors=12) for seed in range(12)]
# Without a compiler, engines start quickly.
GRAPHS = {
    **multicast.COMPILATION, "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4, 8, 12],
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def without_multicast():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in multicast.ENVIRONMENT.items():
            patch.setenv(name, value)
        # vLLM's own all-reduce opens memory of other processes, which such segments are not.
        patch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
        yield


def run(work, config=None, tp=2, **engine):
    job = {} if config is None else {"config": config}
    engine = {
        "max_num_seqs": 12, "tensor_parallel_size": tp, "compilation_config": GRAPHS, **engine,
    }  # fmt: skip
    requests = [{"prompt": problem.prompt} for problem in PROBLEMS]
    return work(**job, engine=engine, rounds=[requests])[0]


@pytest.fixture(scope="module")
def one_rank(work):
    return run(work, CONFIG, tp=1)


@pytest.fixture(scope="module")
def together(work):
    return run(work, {**CONFIG, "sync_heads": True})


@pytest.fixture(scope="module")
def alone(work):
    return run(work, CONFIG)


def correct(found):
    pairs = zip(PROBLEMS, found, strict=True)
    return sum(is_correct(problem, each["text"]) for problem, each in pairs)


def test_two_ranks_keep_the_pages_of_all_heads():
    """In steps and in replayed graphs, number for number."""
    source = Path(deltadecode.__file__).resolve().parents[1]
    path = os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(WORKER), "cuda"], text=True, check=False, timeout=150,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


def test_ranks_that_select_together_give_the_tokens_of_one(one_rank, together):
    # Sums of bfloat16 in another order may turn a few near-ties.
    assert agreeing(one_rank, together) >= 10
    assert correct(together) >= 11


def test_ranks_that_select_together_give_the_tokens_of_one_with_float8_caches(work):
    one = run(work, CONFIG, tp=1, **FLOAT8)
    two = run(work, {**CONFIG, "sync_heads": True}, **FLOAT8)
    # Of a sum in another order, a number on the edge may go to the other float8.
    assert agreeing(one, two) >= 9
    assert correct(two) >= correct(one) - 2


def test_the_compiler_changes_nothing(work, together):
    engine = {
        "compilation_config": {**multicast.COMPILATION, "cudagraph_capture_sizes": [1, 2, 4, 8, 12]}
    }
    assert agreeing(together, run(work, {**CONFIG, "sync_heads": True}, **engine)) >= 10


def test_ranks_that_select_alone_give_the_same_from_graphs_and_eagerly(work, alone):
    assert correct(alone) >= 11
    eager = run(work, CONFIG, enforce_eager=True, compilation_config=multicast.COMPILATION)
    assert agreeing(alone, eager) >= 10


def test_with_every_page_in_the_budget_two_ranks_are_stock_vllm(work):
    assert agreeing(run(work), run(work, {**CONFIG, "budget_pages": 256})) >= 11


def test_two_stages_with_their_own_delta_layers_give_the_tokens_of_one(work, one_rank):
    assert agreeing(one_rank, run(work, CONFIG, tp=1, pipeline_parallel_size=2)) >= 10
