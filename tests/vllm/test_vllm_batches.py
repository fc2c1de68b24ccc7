"""How vLLM schedules must not show: chunks, preemption, prefix hits, sampling of other requests."""

import pytest

from deltadecode.tasks import make_problem

CONFIG = {"budget_pages": 32, "recent_pages": 4}
# The last requests come while others decode, so batches are mixed.
PROBLEMS = [make_problem(seed, steps=8 + seed % 4, distractors=12) for seed in range(6)]
ALONE = 3  # of them also run one after the other, which takes longest
REQUESTS = [{"prompt": problem.prompt} for problem in PROBLEMS]
OTHERS = [
    {"prompt": PROBLEMS[0].prompt, "params": {"temperature": 0.9, "top_p": 0.8, "max_tokens": 60}},
    # What facts there may be, the model does not know: its completions differ.
    {"prompt": "Facts\n", "params": {"temperature": 2.0, "n": 3, "max_tokens": 30}},
    {"prompt": PROBLEMS[2].prompt, "params": {"logprobs": 3, "max_tokens": 40}},
    {"prompt": PROBLEMS[3].prompt, "params": {"choice": ["kamo", "rini"], "max_tokens": 9}},
]  # fmt: skip


@pytest.fixture(scope="module")
def alone(work):
    """Each request in an engine that runs one at a time, its prompt in one piece."""
    job = {
        "side": "vllm", "config": CONFIG, "rounds": [REQUESTS[:ALONE]],
        "engine": {"max_num_seqs": 1, "enable_prefix_caching": False},
    }  # fmt: skip
    return tokens(work(job)["rounds"][0])


@pytest.fixture(scope="module")
def crowded(work):
    """All together, in chunks of 64 tokens, with a cache that holds few of them."""
    job = {
        "side": "vllm", "config": CONFIG, "rounds": [REQUESTS + OTHERS, REQUESTS],
        "engine": {
            "max_num_batched_tokens": 64, "max_num_seqs": 8, "block_size": 32,
            "num_gpu_blocks_override": 40, "enable_prefix_caching": True,
            "disable_log_stats": False, "max_model_len": 640,
        },
    }  # fmt: skip
    return work(job)


def tokens(round_):
    return [request["completions"][0]["tokens"] for request in round_]


def test_mixed_batches_chunks_and_preemption(alone, crowded):
    assert crowded["preempted"] > 0
    assert tokens(crowded["rounds"][0][:ALONE]) == alone


def test_prefix_hits(alone, crowded):
    again = crowded["rounds"][1]
    assert sum(request["cached"] for request in again) > 0
    assert tokens(again)[:ALONE] == alone
    assert tokens(again) == tokens(crowded["rounds"][0][: len(REQUESTS)])


def test_sampling_of_each_request_is_its_own(crowded):
    sampled, several, scored, chosen = crowded["rounds"][0][len(REQUESTS) :]
    assert len(sampled["completions"][0]["tokens"]) > 1
    assert len({tuple(each["tokens"]) for each in several["completions"]}) > 1
    assert len(several["completions"]) == 3
    best = [max(step, key=step.get) for step in scored["completions"][0]["logprobs"]]
    assert best == [str(token) for token in scored["completions"][0]["tokens"]]
    assert chosen["completions"][0]["text"].strip() in ("kamo", "rini")
