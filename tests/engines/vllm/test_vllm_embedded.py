"""The embedded model in vLLM: the tokens that the Transformers integration gives, with one plan."""

import pytest

from deltadecode.lab.tasks import is_correct, make_problem

# Prompts of 340 to 380 tokens and solutions of 270 to 380: sequences cross the 56 pages of 8 tokens
# while they decode, and end with up to two fifths of their pages left out.
CONFIG = {"page_size": 8, "budget_pages": 56, "recent_pages": 4}
PROBLEMS = [make_problem(seed, steps=14 + seed % 6, distractors=28) for seed in range(20)]
REQUESTS = [{"prompt": problem.prompt} for problem in PROBLEMS]


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
    job = {"config": config, "rounds": [REQUESTS[:3]]}
    expected = work({**job, "side": "transformers"})
    assert 0.6 < expected["attended_fraction"] < 0.95
    assert tokens(work({**job, "side": "vllm"})["rounds"][0]) == expected["rounds"][0]


def test_the_answers_are_right(delta):
    right = [
        is_correct(problem, request["completions"][0]["text"])
        for problem, request in zip(PROBLEMS, delta, strict=True)
    ]
    assert sum(right) >= 18


def test_with_every_page_in_the_budget_it_is_stock_vllm(work):
    requests = [{**request, "params": {"max_tokens": 150}} for request in REQUESTS[:4]]
    job = {"side": "vllm", "rounds": [requests]}
    stock = work(job)["rounds"][0]
    same = work({**job, "config": {"budget_pages": 256}})["rounds"][0]
    assert tokens(same) == tokens(stock)
