"""Speculative decoding changes no token of the embedded model (R10)."""

import pytest
from vllm_worker import MODEL

from deltadecode.lab.tasks import make_problem

# Of prompts of 340 to 380 tokens, sparse layers read 320 from the first decode step on.
CONFIG = {"page_size": 8, "budget_pages": 40, "recent_pages": 4}
PROBLEMS = [make_problem(seed, steps=14 + seed % 6, distractors=28) for seed in range(20)]
REQUESTS = [{"prompt": each.prompt, "params": {"max_tokens": 48}} for each in PROBLEMS]
N_GRAM = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}


def tokens(found):
    return [request["completions"][0]["tokens"] for request in found["rounds"][0]]


def run(work, requests, **engine):
    job = {"side": "vllm", "config": CONFIG, "rounds": [requests]}
    return work({**job, "engine": {**engine, "disable_log_stats": False}})


@pytest.fixture(scope="module")
def expected(work):
    return tokens(run(work, REQUESTS))


def test_rule10_drafts_change_no_token(work, expected):
    # Chunks of prompts that pass for drafts by their length, and rows with all numbers of drafts.
    drafting = {**N_GRAM, "num_speculative_tokens": 2}
    found = run(work, REQUESTS, speculative_config=drafting, max_num_batched_tokens=161)
    assert tokens(found) == expected
    assert 0 < found["accepted"] < found["drafted"]


def test_rule10_drafts_of_a_model_change_no_token(work, expected):
    """Its layers are stock: with full attention of the same model, most drafts are right."""
    drafting = {"method": "draft_model", "model": str(MODEL), "num_speculative_tokens": 2}
    found = run(work, REQUESTS[:4], speculative_config=drafting)
    assert tokens(found) == expected[:4]
    assert 0 < 0.5 * found["drafted"] < found["accepted"]
