"""Lossless mode: the tokens of stock vLLM, whatever drafts, caches and batches do (R12 to R14)."""

import pytest

from deltadecode.lab.tasks import make_problem
from deltadecode_vllm import PROPOSER

# Prompts of 340 to 380 tokens; drafts read 16 of their 43 pages and more. Some batches are without
# drafts, as the longest row has it.
CONFIG = {"page_size": 8, "budget_pages": 16, "recent_pages": 3, "min_tokens": 380}
PROBLEMS = [make_problem(seed, steps=14 + seed % 6, distractors=28) for seed in range(14)]
REQUESTS = [{"prompt": each.prompt, "params": {"max_tokens": 48}} for each in PROBLEMS]
DRAFTING = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 4}
SAMPLED = [
    {**REQUESTS[0], "params": {"max_tokens": 16, "temperature": 0.8, "top_p": 0.9, "seed": 7}},
    {**REQUESTS[1], "params": {"max_tokens": 16, "temperature": 1.5, "n": 3}},
    {**REQUESTS[3], "params": {"max_tokens": 8, "choice": ["kamo", "rini"]}},
]
# Few blocks for eight rows, prompts in chunks that pass for drafts by their length, and a sequence
# that reaches the longest one.
TIGHT = {
    "max_num_seqs": 8, "max_num_batched_tokens": 163, "num_gpu_blocks_override": 24,
    "block_size": 128, "enable_prefix_caching": True, "max_model_len": 600,
}  # fmt: skip
# By itself: beside rows that sample, penalties go wrong with n-gram drafts of stock vLLM, too.
PENALTY = [{**REQUESTS[2], "params": {"max_tokens": 16, "logprobs": 2, "repetition_penalty": 1.1}}]
LONG = [{**REQUESTS[4], "params": {"max_tokens": 400, "ignore_eos": True}}]


def tokens(round_):
    return [[each["tokens"] for each in request["completions"]] for request in round_]


@pytest.fixture(scope="module")
def stock(work):
    rounds = [REQUESTS, PENALTY, LONG]
    return work({"side": "vllm", "rounds": rounds, "engine": {"max_model_len": 600}})["rounds"]


@pytest.fixture(scope="module")
def lossless(work):
    engine = {**TIGHT, "speculative_config": DRAFTING, "disable_log_stats": False}
    # As on GPUs; test_vllm_lossless_sampling.py is without.
    job = {"side": "vllm", "config": CONFIG, "engine": engine, "async_scheduling": True}
    job["rounds"] = [REQUESTS, REQUESTS[::-1], SAMPLED, PENALTY, LONG]
    return work(job, VLLM_ENABLE_V1_MULTIPROCESSING="1")  # so the engine has its own process


def test_rule14_greedy_output_is_that_of_stock_vllm(stock, lossless):
    assert tokens(lossless["rounds"][0]) == tokens(stock[0])
    assert lossless["async_scheduling"] and lossless["preempted"] > 0
    assert lossless["accepted"] > 0.7 * lossless["drafted"] > 0


def test_rule14_blocks_hold_what_stock_vllm_writes(stock, lossless):
    again = lossless["rounds"][1]
    assert tokens(again)[::-1] == tokens(stock[0])
    assert sum(request["cached"] for request in again) > 0


def test_rule13_sampling_parameters_work_as_ever(stock, lossless):
    sampled = lossless["rounds"][2]
    assert [len(each) for each in tokens(sampled)] == [1, 3, 1]
    assert sampled[2]["completions"][0]["text"] in ("kamo", "rini")


def test_rule13_penalties_change_the_same_tokens(stock, lossless):
    assert tokens(lossless["rounds"][3]) == tokens(stock[1])


def test_rule14_a_sequence_that_reaches_the_longest_one(stock, lossless):
    assert tokens(lossless["rounds"][4]) == tokens(stock[2])
    assert len(tokens(stock[2])[0][0]) > 200
