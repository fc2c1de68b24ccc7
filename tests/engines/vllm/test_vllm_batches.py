"""How vLLM schedules must not show: chunks, preemption, prefix hits, sampling of other requests."""

import pytest

from deltadecode.lab.tasks import make_problem

CONFIG = {"page_size": 8, "budget_pages": 32, "recent_pages": 4}
# The last requests come while others decode, so batches are mixed.
PROBLEMS = [make_problem(seed, steps=8 + seed % 4, distractors=12) for seed in range(6)]
ALONE = 2  # of them also run one after the other, which takes longest
REQUESTS = [{"prompt": problem.prompt} for problem in PROBLEMS]
# Of 321 tokens: in chunks of 64, and after 10 cached blocks of 32, the last one is left alone.
LONE = {
    "prompt": [5 + (7 * place) % 500 for place in range(321)],
    "params": {"logprobs": 5, "max_tokens": 3},
}  # fmt: skip
# In the same chunks, three tokens are left: as many as a row has that verifies two drafts.
FEW = {**LONE, "prompt": [5 + (7 * place) % 500 for place in range(323)]}
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
        "side": "vllm", "config": CONFIG, "rounds": [REQUESTS[:ALONE], [LONE], [FEW]],
        "engine": {"max_num_seqs": 1, "enable_prefix_caching": False},
    }  # fmt: skip
    return work(job)["rounds"]


@pytest.fixture(scope="module")
def crowded(work):
    """All together, in chunks of 64 tokens, with a cache that holds few of them."""
    job = {
        "side": "vllm", "config": CONFIG, "rounds": [REQUESTS + OTHERS, REQUESTS, [LONE], [LONE]],
        "engine": {
            "max_num_batched_tokens": 64, "max_num_seqs": 8, "block_size": 32,
            "num_gpu_blocks_override": 40, "enable_prefix_caching": True,
            "disable_log_stats": False, "max_model_len": 640,
        },
    }  # fmt: skip
    return work(job)


@pytest.fixture(scope="module")
def drafting(work):
    """The same prompt twice, in an engine whose rows of up to three tokens verify drafts."""
    n_gram = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 2}
    job = {
        "side": "vllm", "config": CONFIG, "rounds": [[FEW], [FEW]],
        "engine": {
            "speculative_config": {**n_gram, "num_speculative_tokens": 2},
            "max_num_batched_tokens": 64, "block_size": 32, "enable_prefix_caching": True,
        },
    }  # fmt: skip
    return work(job)["rounds"]


def tokens(round_):
    return [request["completions"][0]["tokens"] for request in round_]


def test_mixed_batches_chunks_and_preemption(alone, crowded):
    assert crowded["preempted"] > 0
    assert tokens(crowded["rounds"][0][:ALONE]) == tokens(alone[0])


def test_prefix_hits(alone, crowded):
    again = crowded["rounds"][1]
    assert sum(request["cached"] for request in again) > 0
    assert tokens(again)[:ALONE] == tokens(alone[0])
    assert tokens(again) == tokens(crowded["rounds"][0][: len(REQUESTS)])


@pytest.mark.parametrize("round_", [2, 3])
def test_the_last_token_of_a_prompt_is_prefill_when_it_comes_alone(alone, crowded, round_):
    got = crowded["rounds"][round_][0]
    assert got["cached"] == (0 if round_ == 2 else 320)
    for step, expected in zip(
        got["completions"][0]["logprobs"], alone[1][0]["completions"][0]["logprobs"], strict=True
    ):
        assert step == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("round_", [0, 1])
def test_the_last_tokens_of_a_prompt_are_prefill_and_no_drafts(alone, drafting, round_):
    got = drafting[round_][0]
    assert got["cached"] == (0 if round_ == 0 else 320)
    for step, expected in zip(
        got["completions"][0]["logprobs"], alone[2][0]["completions"][0]["logprobs"], strict=True
    ):
        assert step == pytest.approx(expected, abs=2e-3)


def test_sampling_of_each_request_is_its_own(crowded):
    sampled, several, scored, chosen = crowded["rounds"][0][len(REQUESTS) :]
    assert len(sampled["completions"][0]["tokens"]) > 1
    assert len({tuple(each["tokens"]) for each in several["completions"]}) > 1
    assert len(several["completions"]) == 3
    best = [max(step, key=step.get) for step in scored["completions"][0]["logprobs"]]
    assert best == [str(token) for token in scored["completions"][0]["tokens"]]
    assert chosen["completions"][0]["text"].strip() in ("kamo", "rini")
