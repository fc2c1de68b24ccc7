"""Tiny random models: what a process loads, what is counted, windows and shared caches."""

import pytest
from tiny_runs import PROMPTS, SPARSE

from deltadecode import DeltaConfig
from deltadecode.engines.serving.counts import attended_tokens
from deltadecode.engines.serving.settings import ServingSettings

PROMPT, OTHER = PROMPTS
ALL_PAGES = {**SPARSE, "budget_pages": 32}
# The layers that share a cache are sparse ones, and the layer whose cache it is is dense.
SHARED = {**ALL_PAGES, "dense_layers": [1, 3], "delta_layers": [5]}
N_GRAM = {
    "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2,
}  # fmt: skip
BLOCKS = {"block_size": 32, "enable_prefix_caching": True}
# The last one loads numba, after which vLLM 0.32 starts no other engine in its process on CPUs.
RUNS = {
    "stock": {"model": "llama", "engine": BLOCKS},
    "window": {"model": "phi", "config": {**ALL_PAGES, "on_unsupported": "stock"}},
    "window, sparse": {"model": "phi", "config": SPARSE},
    "window, stock": {"model": "phi"},
    "shared": {"model": "gemma3n", "config": SHARED},
    "shared with a Δ-layer": {
        "model": "gemma3n", "config": {**SHARED, "dense_layers": [1], "delta_layers": [3, 7]},
    },
    "shared, stock": {"model": "gemma3n"},
    "sparse": {"model": "llama", "config": SPARSE, "prompts": [PROMPT]},
    "more than there is": {
        "model": "llama", "config": {**SPARSE, "budget_pages": 10**30, "min_tokens": 10**30},
    },
    "speculative": {
        "model": "llama", "config": SPARSE, "engine": {**BLOCKS, "speculative_config": N_GRAM},
        "prompts": [PROMPT],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def ran(tiny):
    """Run -> what it gave, all engines one after the other in one process."""
    runs = {
        name: {"prompts": [PROMPT, OTHER], "max_tokens": 40, **run} for name, run in RUNS.items()
    }
    return tiny(runs)


def test_a_stock_engine_loads_nothing_of_ours_and_transformers_stays_as_it_is(ran):
    assert (ran["stock"]["modules"], ran["stock"]["delta"]) == ([], False)


def test_rule3_numbers_beyond_any_sequence_read_everything(ran):
    """Nothing is as large as the budget: a table of so many pages would not go into any memory."""
    run = ran["more than there is"]
    assert "error" not in run, run["error"]
    assert run["tokens"] == ran["stock"]["tokens"]
    assert run["counted"][0] == run["counted"][1] > 0


def decode_rows(run, prompt):
    """New tokens and length of each row after the prompt, as the engine ran them."""
    rows = [row for batch in run["batches"] for row in zip(*batch, strict=True)]
    return [(new, length) for new, length in rows if length - new >= len(prompt)]


def test_rule11_rows_of_drafts_are_counted_as_what_ran(ran):
    run = ran["speculative"]
    rows = decode_rows(run, PROMPT)
    several = [row for row in rows if row[0] > 1]
    assert several and len(several) < len(rows), "both kinds of rows have to occur"
    config = DeltaConfig(**SPARSE)
    settings = ServingSettings(config, config.layer_plan(4, (0, 1, 2, 3)))
    attended = full = 0
    for new, length in rows:
        for tokens in range(length - new + 1, length + 1):
            one, all_of_it = attended_tokens(settings, tokens)
            attended, full = attended + one, full + all_of_it
    # Each draft reads three pages in the sparse layers, which are half of them.
    assert attended < 0.75 * full
    assert run["counted"] == [attended, full]


def test_rule10_drafts_change_no_probability(ran):
    run, expected = ran["speculative"], ran["sparse"]
    assert run["tokens"] == expected["tokens"]
    for step, alone in zip(run["logprobs"][0], expected["logprobs"][0], strict=True):
        assert step == pytest.approx(alone, abs=1e-3)


def test_rule1_blocks_of_a_plan_are_not_those_of_stock_vllm(ran):
    stock, planned = ran["stock"]["hashes"], ran["speculative"]["hashes"]
    assert [len(each) for each in (stock[0], planned[0])] == [1, 1]  # a whole block of 60 tokens
    assert stock[0] != planned[0]


def test_rule11_a_stock_engine_after_one_with_delta_is_not_counted(ran):
    attended, full = ran["window, sparse"]["counted"]
    assert 0 < attended < full
    assert len(ran["window, stock"]["tokens"][0]) == 40
    assert ran["window, stock"]["counted"] == [0, 0]


def test_a_window_as_long_as_the_longest_sequence_hides_nothing(ran):
    assert "error" not in ran["window"], ran["window"]["error"]
    assert ran["window"]["tokens"] == ran["window, stock"]["tokens"]


@pytest.mark.parametrize("case", ["shared", "shared with a Δ-layer"])
def test_layers_that_share_a_cache_read_what_was_written(ran, case):
    run, stock = ran[case], ran["shared, stock"]
    assert run["counted"][0] == run["counted"][1] > 0
    assert run["tokens"] == stock["tokens"]
    for one, other in zip(run["logprobs"], stock["logprobs"], strict=True):
        for step, expected in zip(one, other, strict=True):
            assert step == pytest.approx(expected, abs=2e-3)
