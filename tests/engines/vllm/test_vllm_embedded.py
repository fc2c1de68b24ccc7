"""The embedded model in vLLM: the tokens that the Transformers integration gives, with one plan."""

import pytest
from vllm_worker import MODEL

from deltadecode.lab.tasks import is_correct, make_problem

# Prompts of 340 to 380 tokens and solutions of 270 to 380: sequences cross the 56 pages of 8 tokens
# while they decode, and end with up to two fifths of their pages left out.
CONFIG = {"page_size": 8, "budget_pages": 56, "recent_pages": 4}
PROBLEMS = [make_problem(seed, steps=14 + seed % 6, distractors=28) for seed in range(20)]
REQUESTS = [{"prompt": problem.prompt} for problem in PROBLEMS]
# Prompts' chunks of 3 tokens and fewer, which pass for drafts, and batches of many kinds of rows.
DRAFTING = {
    "speculative_config": {
        "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    },
    "max_num_batched_tokens": 161, "disable_log_stats": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def delta(work):
    return work({"side": "vllm", "config": CONFIG, "rounds": [REQUESTS]})["rounds"][0]


def tokens(round_):
    return [request["completions"][0]["tokens"] for request in round_]


def test_greedy_output_equals_the_transformers_integration(work, delta):
    job = {"side": "transformers", "config": CONFIG, "rounds": [REQUESTS]}
    expected = work(job)
    assert 0.3 < expected["attended_fraction"] < 0.9
    assert tokens(delta) == expected["rounds"][0]


def test_rule4_a_budget_that_grows_with_the_context(work):
    """Three quarters are more than 40 pages from the 54th on, which all sequences reach."""
    config = {**CONFIG, "budget_pages": 40, "budget_share": 0.75}
    job = {"config": config, "rounds": [REQUESTS[:6]]}
    expected = work({**job, "side": "transformers"})
    assert 0.6 < expected["attended_fraction"] < 0.95
    assert tokens(work({**job, "side": "vllm"})["rounds"][0]) == expected["rounds"][0]


def test_rule10_drafts_change_no_token(work, delta):
    requests = [{**request, "params": {"max_tokens": 200}} for request in REQUESTS]
    job = {"side": "vllm", "config": CONFIG, "rounds": [requests], "engine": DRAFTING}
    drafting = work(job)
    assert tokens(drafting["rounds"][0]) == [each[:200] for each in tokens(delta)]
    assert 100 < drafting["accepted"] < drafting["drafted"]


def test_rule10_drafts_of_a_model_change_no_token(work, delta):
    """Its layers are stock: with full attention of the same model, most drafts are right."""
    drafting = {
        "speculative_config": {
            "method": "draft_model", "model": str(MODEL), "num_speculative_tokens": 2,
        },
        "disable_log_stats": False,
    }  # fmt: skip
    requests = [{**request, "params": {"max_tokens": 200}} for request in REQUESTS[:4]]
    found = work({"side": "vllm", "config": CONFIG, "rounds": [requests], "engine": drafting})
    assert tokens(found["rounds"][0]) == [each[:200] for each in tokens(delta)[:4]]
    assert 0 < 0.5 * found["drafted"] < found["accepted"]


def test_the_answers_are_right(delta):
    right = [
        is_correct(problem, request["completions"][0]["text"])
        for problem, request in zip(PROBLEMS, delta, strict=True)
    ]
    assert sum(right) >= 18


def test_with_every_page_in_the_budget_it_is_stock_vllm(work):
    job = {"side": "vllm", "rounds": [REQUESTS[:4]]}
    stock = work(job)["rounds"][0]
    same = work({**job, "config": {"budget_pages": 256}})["rounds"][0]
    assert tokens(same) == tokens(stock)
