"""vLLM on a GPU: full CUDA graphs of decode steps give what plain steps give.

Needs vLLM; the package need not be installed, only on the path: ``pytest -m gpu tests/gpu``.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import deltadecode
from deltadecode.tasks import is_correct, make_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]
WORKER = Path(__file__).parents[1] / "vllm" / "vllm_worker.py"
# Sequences cross the 80 pages of 8 tokens while they decode, all in one captured graph.
CONFIG = {"page_size": 8, "budget_pages": 80, "recent_pages": 4}
PROBLEMS = [make_problem(seed, steps=20 + seed % 12, distractors=28) for seed in range(21)]
# A cache of fixed size: what else runs on the device then has no say in how much there is.
ENGINE = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 2**31,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    # What an installation would have written, so that each process of vLLM finds the plugin.
    info = folder / f"deltadecode-{deltadecode.__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: deltadecode\nVersion: {deltadecode.__version__}\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ndeltadecode = deltadecode.integrations.vllm.plugin:register\n"
    )
    source = Path(deltadecode.__file__).resolve().parents[1]
    path = os.pathsep.join([str(folder), str(source), os.environ.get("PYTHONPATH", "")])

    def run(**job):
        job = {"side": "vllm", "rounds": [[{"prompt": p.prompt} for p in PROBLEMS]], **job}
        job["engine"] = {**ENGINE, **job.get("engine", {})}
        out = folder / "found.json"
        done = subprocess.run(
            [sys.executable, str(WORKER), json.dumps(job), str(out)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            env={**os.environ, "PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "WARNING"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
        rounds = json.loads(out.read_text())["rounds"]
        return [[request["completions"][0] for request in round_] for round_ in rounds]

    return run


@pytest.fixture(scope="module")
def graphs(work):
    return work(config=CONFIG)[0]


def agreeing(some, others):
    return sum(a["tokens"] == b["tokens"] for a, b in zip(some, others, strict=True))


def test_the_answers_are_right(graphs):
    pairs = zip(PROBLEMS, graphs, strict=True)
    assert sum(is_correct(problem, found["text"]) for problem, found in pairs) >= 19


def test_graphs_equal_eager_steps(work, graphs):
    # Sums of bfloat16 in another order may turn one near-tie.
    assert agreeing(graphs, work(config=CONFIG, engine={"enforce_eager": True})[0]) >= 20


def test_mixed_batches_chunks_and_prefix_hits(work, graphs):
    requests = [{"prompt": p.prompt} for p in PROBLEMS]
    engine = {"max_num_batched_tokens": 128, "max_num_seqs": 6, "enable_prefix_caching": True}
    first, again = work(config=CONFIG, engine=engine, rounds=[requests, requests])
    assert agreeing(graphs, first) >= 20
    assert agreeing(graphs, again) >= 20


def test_the_last_token_of_a_prompt_is_prefill_when_it_comes_alone(work):
    """After a prefix hit it is a row of a captured graph; few pages would show."""
    lone = {
        "prompt": [5 + (7 * place) % 500 for place in range(897)],
        "params": {"logprobs": 5, "max_tokens": 1},
    }
    config = {"page_size": 8, "budget_pages": 12, "recent_pages": 2}
    whole, again = work(config=config, rounds=[[lone], [lone]])
    whole, again = whole[0]["logprobs"][0], again[0]["logprobs"][0]
    assert max(whole, key=whole.get) == max(again, key=again.get)
    both = whole.keys() & again.keys()
    assert len(both) >= 4
    assert {t: again[t] for t in both} == pytest.approx({t: whole[t] for t in both}, abs=0.1)


def test_with_every_page_in_the_budget_it_is_stock_vllm(work):
    assert agreeing(work()[0], work(config={"budget_pages": 256})[0]) >= 20
