"""vLLM's second model runner, which is its default on GPUs, gives what the first one gives.

vLLM 0.24 takes it for Llama, Mistral, Qwen3 and a few more, and later releases for all models.
"""

import pytest
from conftest import SECOND_RUNNER
from tiny_runs import PROMPTS, SPARSE

ALTERNATING = {**SPARSE, "dense_layers": [1], "delta_layers": [3]}
RUN = {"model": "llama", "prompts": PROMPTS, "max_tokens": 20}
RUNS = {
    "stock": RUN,
    "every page": {**RUN, "config": {**SPARSE, "budget_pages": 32}},
    # Chunks of prompts beside decode rows.
    "chunks": {
        **RUN, "config": SPARSE, "engine": {"max_num_batched_tokens": 40, "max_num_seqs": 2},
    },
    # The prompt's last chunk, which looks like a decode row and reads everything (R1).
    "one token is left": {
        **RUN, "config": SPARSE, "prompts": PROMPTS[1:], "engine": {"max_num_batched_tokens": 40},
    },
    "prefix hits": {**RUN, "config": SPARSE, "engine": {"block_size": 32}, "rounds": 2},
    "preemption": {
        **RUN, "config": SPARSE, "max_tokens": 100,
        "engine": {"block_size": 32, "num_gpu_blocks_override": 9, "max_model_len": 192},
    },
    "windows": {**RUN, "model": "gemma3", "config": ALTERNATING},
    "adapter": {**RUN, "config": SPARSE, "lora": True},
    "verify rows": {**RUN, "config": SPARSE, "drafter": "eagle", "drafts": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def ran(tiny):
    return {1: tiny(RUNS, fork=True), 2: tiny(RUNS, SECOND_RUNNER, fork=True)}


@pytest.mark.parametrize("name", RUNS)
def test_the_second_runner_gives_the_tokens_and_counts_of_the_first(ran, name):
    first, second = (ran[number][name] for number in (1, 2))
    assert "error" not in first, first["error"]
    assert "error" not in second, second["error"]
    assert (first["runner"], second["runner"]) == (1, 2)
    for what in ("tokens", "counted", "cached", "preempted", "accepted", "drafted"):
        assert second[what] == first[what]
    # A token that read too little shows in these, where the likeliest stays the same.
    for ours, theirs in zip(second["logprobs"], first["logprobs"], strict=True):
        assert [pytest.approx(each, abs=1e-3) for each in theirs] == ours


def test_what_runs_is_what_they_are_named_after(ran):
    """Sparse and not, chunked, cached, preempted and drafted."""
    runs = ran[2]
    assert runs["stock"]["tokens"] == runs["every page"]["tokens"]
    assert runs["stock"]["tokens"] != runs["chunks"]["tokens"] != runs["preemption"]["tokens"]
    sparse = [runs[name]["counted"] for name in RUNS if name not in ("stock", "every page")]
    assert all(0 < attended < full for attended, full in sparse)
    assert any(1 in new and max(new) > 1 for new, _ in runs["chunks"]["batches"])
    assert [1] in [new for new, lengths in runs["one token is left"]["batches"] if lengths == [41]]
    assert sum(runs["prefix hits"]["cached"]) > 0
    assert runs["preemption"]["preempted"] > 0
    assert runs["verify rows"]["drafted"] > 0


def test_clsa_gives_the_tokens_of_transformers(run_job):
    """Prompts in chunks, beside rows that decode, and then from the cache of prefixes."""
    job = {
        "prompts": [PROMPTS[0], PROMPTS[1], PROMPTS[0] * 3], "max_tokens": 20,
        "engine": {"max_num_batched_tokens": 48, "block_size": 32, "enable_prefix_caching": True},
        "runs": {"here": {"mode": "clsa", "rounds": 2}},
    }  # fmt: skip
    found = run_job("clsa_worker.py", job, **SECOND_RUNNER)
    here = found["here"]
    assert here["runner"] == 2
    assert here["tokens"] == [found["clsa"]["tokens"]] * 2
    assert max(here["cached"][1]) >= 128
