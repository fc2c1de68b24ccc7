"""What vLLM does beside attention, in combinations: none of it shows in what comes out.

The engines have every two of them at once: prefix caching, prompts in chunks, drafts by n-grams,
preemption.
"""

import pytest
from tiny_runs import SPARSE

PROMPTS = [
    [5 + (7 * place + 3 * number) % (23 + 4 * number) for place in range(60 + 9 * number)]
    for number in range(6)
]
ALL_PAGES = {**SPARSE, "budget_pages": 32}
FEATURES = {
    "prefixes": {"enable_prefix_caching": True},
    "chunks": {"max_num_batched_tokens": 32},
    "drafts": {
        "speculative_config": {
            "method": "ngram", "num_speculative_tokens": 3,
            "prompt_lookup_min": 1, "prompt_lookup_max": 2,
        },
    },
    "preemption": {"num_gpu_blocks_override": 10},
}  # fmt: skip
CELLS = [
    ("prefixes", "chunks", "drafts", "preemption"),
    ("prefixes", "chunks"),
    ("chunks", "preemption"),
    ("drafts", "preemption"),
]
# The tokens of a preempted sequence come again as a prompt, in full attention: what follows them is
# not what the plan alone would give (R1).
SPARSE_CELLS = [("prefixes", "chunks"), ("prefixes", "chunks", "drafts")]


def cell(features, config=None):
    engine = {"block_size": 32, "enable_prefix_caching": False}
    for feature in features:
        engine |= FEATURES[feature]
    run = {
        "model": "llama", "prompts": PROMPTS, "max_tokens": 48, "rounds": 2, "engine": engine,
        "logprobs": None,
    }  # fmt: skip
    return run if config is None else {**run, "config": config}


@pytest.fixture(scope="module")
def ran(tiny):
    runs = {"stock": cell(()), "sparse": cell((), SPARSE)}
    runs |= {("all", *names): cell(names, ALL_PAGES) for names in CELLS}
    runs |= {("sparse", *names): cell(names, SPARSE) for names in SPARSE_CELLS}
    return tiny({str(name): run for name, run in runs.items()}, fork=True)


def check_that_they_happened(run, features):
    assert (sum(run["cached"]) > 0) == ("prefixes" in features)
    assert (run["preempted"] > 0) == ("preemption" in features)
    assert (run["drafted"] > 0) == ("drafts" in features)
    longest = max(new for news, _ in run["batches"] for new in news)
    assert longest <= 32 if "chunks" in features else longest > 60


@pytest.mark.parametrize("features", CELLS, ids=" ".join)
def test_with_every_page_in_the_budget_it_is_stock_vllm(ran, features):
    run = ran[str(("all", *features))]
    assert "error" not in run, run["error"]
    check_that_they_happened(run, features)
    assert run["tokens"] == ran["stock"]["tokens"]


@pytest.mark.parametrize("features", SPARSE_CELLS, ids=" ".join)
def test_a_sparse_plan_gives_what_it_gives_without(ran, features):
    run = ran[str(("sparse", *features))]
    assert "error" not in run, run["error"]
    check_that_they_happened(run, features)
    assert run["tokens"] == ran["sparse"]["tokens"] != ran["stock"]["tokens"]
