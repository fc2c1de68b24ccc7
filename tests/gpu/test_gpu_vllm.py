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
from transformers import AutoTokenizer

import deltadecode
from deltadecode.lab.tasks import is_correct, make_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]
BLOCK = 16
MODEL = (
    Path(__file__).parents[2] / "packages" / "embedded" / "src" / "deltadecode_embedded" / "model"
)
WORKER = Path(__file__).parents[1] / "engines" / "vllm" / "vllm_worker.py"
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


def plugin_path(folder):
    """What to have on the path so that each process of vLLM finds the plugin."""
    # What an installation would have written.
    info = folder / f"deltadecode-{deltadecode.__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: deltadecode\nVersion: {deltadecode.__version__}\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ndeltadecode = deltadecode_vllm:register\n"
    )
    source = Path(deltadecode.__file__).resolve().parents[1]
    return os.pathsep.join([str(folder), str(source), os.environ.get("PYTHONPATH", "")])


def said(output):
    """What a process wrote, its first errors before its last words: those name no cause."""
    errors = [line for line in output.splitlines() if "Error" in line]
    return "\n".join([*errors[:10], output[-3000:]])


def run_worker(folder, path, job):
    """What an engine in a process of its own found; ``path`` is that of :func:`plugin_path`."""
    out, given = folder / "found.json", folder / "job.json"
    given.write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(given), str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "WARNING"},
    )  # fmt: skip
    assert done.returncode == 0, said(done.stdout)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Runs of vllm_worker.py: a job -> what it found, a dict for each request of a round."""
    folder = tmp_path_factory.mktemp("vllm")
    path = plugin_path(folder)

    def run(**job):
        job = {"side": "vllm", "rounds": [[{"prompt": p.prompt} for p in PROBLEMS]], **job}
        job["engine"] = {**ENGINE, **job.get("engine", {})}
        found = run_worker(folder, path, job)
        found["rounds"] = [
            [{**request["completions"][0], "cached": request["cached"]} for request in round_]
            for round_ in found["rounds"]
        ]
        return found

    return run


@pytest.fixture(scope="module")
def work(counted):
    """The rounds alone."""
    return lambda **job: counted(**job)["rounds"]


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


def test_a_budget_that_grows_in_graphs_equals_eager_steps(work):
    config = {**CONFIG, "budget_pages": 60, "budget_share": 0.75}
    some, others = (
        work(config=config, engine={"enforce_eager": eager})[0] for eager in (False, True)
    )
    assert agreeing(some, others) >= 20


# On the device n-grams are scheduled asynchronously, as drafts of models are.
@pytest.mark.parametrize("method, eager", [("ngram", False), ("ngram", True), ("ngram_gpu", False)])
def test_rule10_drafts_change_no_answer(work, graphs, method, eager):
    n_gram = {"method": method, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    drafting = {"speculative_config": {**n_gram, "num_speculative_tokens": 3}}
    found = work(config=CONFIG, engine={**drafting, "enforce_eager": eager})[0]
    # A row of drafts adds up in another order, too: a few near-ties may turn.
    assert agreeing(graphs, found) >= 18
    pairs = zip(PROBLEMS, found, strict=True)
    assert sum(is_correct(problem, each["text"]) for problem, each in pairs) >= 18


def test_mixed_batches_chunks_and_prefix_hits(work, graphs):
    requests = [{"prompt": p.prompt} for p in PROBLEMS]
    engine = {"max_num_batched_tokens": 128, "max_num_seqs": 6, "enable_prefix_caching": True}
    first, again = work(config=CONFIG, engine=engine, rounds=[requests, requests])
    assert agreeing(graphs, first) >= 20
    assert agreeing(graphs, again) >= 20


def first_part(problem, tokenizer):
    """Token ids of a problem and most of its solution, one more than a number of whole blocks."""
    prompt, solution = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in (problem.prompt, problem.solution)
    )
    length = len(prompt) + len(solution) * 3 // 4
    return (prompt + solution)[: length - (length - 1) % BLOCK]


def test_the_last_token_of_a_prompt_is_prefill_when_it_comes_alone(work):
    """After a prefix hit it is a row of a captured graph, and must still read every page."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    parts = [first_part(problem, tokenizer) for problem in PROBLEMS]
    one = [{"prompt": part, "params": {"max_tokens": 1}} for part in parts]
    # The same token again, now as one that was generated: a step of DELTA, starved of pages.
    two = [{"prompt": part[:-1], "params": {"max_tokens": 2}} for part in parts]
    config = {"page_size": 8, "budget_pages": 2, "recent_pages": 1, "delta_layers": [0]}
    whole, again, starved = work(
        config=config, engine={"block_size": BLOCK}, rounds=[one, one, two]
    )
    assert [each["cached"] for each in again] == [len(part) - 1 for part in parts]
    assert agreeing(whole, again) >= 20
    same_last = [each["tokens"][0] == part[-1] for each, part in zip(starved, parts, strict=True)]
    assert sum(same_last) >= 20
    right = [w["tokens"][0] == s["tokens"][1] for w, s in zip(whole, starved, strict=True)]
    assert sum(right) < 17, "a step that reads two pages has to show, or this test shows nothing"


FLOAT8 = {"kv_cache_dtype": "fp8"}


@pytest.fixture(scope="module")
def float8(work):
    return work(config=CONFIG, engine=FLOAT8)[0]


def test_float8_answers_are_as_right_as_those_of_stock_vllm(work, float8):
    stock = work(engine=FLOAT8)[0]
    everything = work(config={**CONFIG, "budget_pages": 256}, engine=FLOAT8)[0]
    rights = [
        sum(
            is_correct(problem, each["text"]) for problem, each in zip(PROBLEMS, found, strict=True)
        )
        for found in (stock, everything, float8)
    ]
    # Stock attention rounds softmax weights to float8 as well, which turns near-ties.
    assert min(rights[1:]) >= rights[0] - 2 and rights[0] >= 15
    assert agreeing(stock, everything) >= 14


def test_float8_graphs_equal_eager_steps(work, float8):
    assert agreeing(float8, work(config=CONFIG, engine={**FLOAT8, "enforce_eager": True})[0]) >= 19


def test_float8_with_drafts_mixed_batches_and_prefix_hits(work, float8):
    requests = [{"prompt": p.prompt} for p in PROBLEMS]
    n_gram = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    sizes = {"max_num_batched_tokens": 128, "max_num_seqs": 6, "enable_prefix_caching": True}
    for more in ({}, {"speculative_config": {**n_gram, "num_speculative_tokens": 3}}):
        first, again = work(
            config=CONFIG, engine={**FLOAT8, **sizes, **more}, rounds=[requests, requests]
        )
        assert agreeing(float8, first) >= 17
        assert agreeing(float8, again) >= 17
        assert sum(each["cached"] for each in again) > 0


def test_with_every_page_in_the_budget_it_is_stock_vllm(work):
    assert agreeing(work()[0], work(config={"budget_pages": 256})[0]) >= 20
