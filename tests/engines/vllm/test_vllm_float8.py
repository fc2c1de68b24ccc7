"""Float8 keys and values: stock vLLM with every page, the reference with few, and prefix hits.

Prefixes with answers in them also as keys and values that are not rounded.
"""

from statistics import median

import pytest
from tiny_runs import SPARSE

from deltadecode_vllm import PROPOSER

PROMPTS = [
    [5 + 7 * (place % 9) % 50 for place in range(80)],
    [3 + 11 * place % 59 for place in range(41)],
]
ALL_PAGES = {**SPARSE, "budget_pages": 32}
# No powers of two: with those, float8 would round to the same numbers as without.
SCALES = [0.05, 0.03]
RUN = {
    "model": "llama", "prompts": PROMPTS, "max_tokens": 40, "float8": [1, 1],
    "engine": {"block_size": 32, "kv_cache_dtype": "fp8", "enable_prefix_caching": False},
}  # fmt: skip
SCALED = {**RUN, "float8": SCALES, "engine": {**RUN["engine"], "kv_cache_dtype": "auto"}}
TWO_TURNS = {
    **SCALED, "config": SPARSE, "rounds": 2,
    "engine": {**SCALED["engine"], "enable_prefix_caching": True, "max_num_batched_tokens": 32},
}  # fmt: skip
# Three of four layers are sparse: keys and values of decoded tokens are not those of a prefill.
MOSTLY_SPARSE = {**SPARSE, "dense_layers": [], "delta_layers": [0]}
# The second prompt is the first and its answer. Of 120 tokens, 96 are in the cache; of 81, 64.
ANSWERED = {
    **RUN, "config": MOSTLY_SPARSE, "rounds": 2, "answered": True, "logprobs": None,
    "engine": {**RUN["engine"], "enable_prefix_caching": True},
}  # fmt: skip
ANSWERED_AUTO = {
    **ANSWERED, "float8": None, "engine": {**ANSWERED["engine"], "kv_cache_dtype": "auto"},
}  # fmt: skip
# Each verification has more rows than some of these prompts have pages.
MOST_DRAFTS = {
    **RUN, "config": {**SPARSE, "min_tokens": 0}, "cut": True,
    "engine": {
        **RUN["engine"],
        "speculative_config": {
            "method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 16,
        },
    },
}  # fmt: skip
RUNS = {
    "stock": RUN,
    "16 drafts": MOST_DRAFTS,
    "every page": {**RUN, "config": ALL_PAGES, "cut": True},
    "sparse": {**RUN, "config": SPARSE},
    "reference": {**RUN, "config": SPARSE, "side": "transformers"},
    "not rounded": {**RUN, "config": SPARSE, "side": "transformers", "float8": None},
    "scaled, stock": SCALED,
    "scaled, every page": {**SCALED, "config": ALL_PAGES, "cut": True},
    "scaled, sparse": {**SCALED, "config": SPARSE},
    "scaled, reference": {**SCALED, "config": SPARSE, "side": "transformers"},
    "scaled, two turns": TWO_TURNS,
    "fp8, answered": ANSWERED,
    "fp8, answered, reference": {**ANSWERED, "side": "transformers"},
    "auto, answered": ANSWERED_AUTO,
    "auto, answered, prefilled": {
        **ANSWERED_AUTO,
        "engine": {**RUN["engine"], "kv_cache_dtype": "auto"},
    },
    "auto, answered, reference": {**ANSWERED_AUTO, "side": "transformers"},
}


@pytest.fixture(scope="module")
def ran(tiny):
    """Run -> what it gave; none without stock vLLM on such a CPU."""
    found = tiny(RUNS, fork=True)
    stock = found["stock"]
    if "FP8 KV cache" in stock.get("error", ""):
        pytest.skip(f"stock vLLM has no float8 caches here: {stock['error']}")
    errors = {name: run["error"] for name, run in found.items() if "error" in run}
    assert not errors
    return found


@pytest.mark.parametrize("scales", ["", "scaled, "])
def test_with_every_page_in_the_budget_it_is_stock_vllm(ran, scales):
    run, stock = ran[f"{scales}every page"], ran[f"{scales}stock"]
    assert run["tokens"] == stock["tokens"]
    for one, other in zip(run["logprobs"], stock["logprobs"], strict=True):
        apart = []
        for step, expected in zip(one, other, strict=True):
            # Of a sum in another order, a number on the edge may go to the other float8. To round
            # all of them otherwise moves every step by tenths.
            assert step == pytest.approx(expected, abs=2e-2)
            apart.append(max(abs(step[token] - expected[token]) for token in expected))
        assert median(apart) < 1e-4


@pytest.mark.parametrize("scales", ["", "scaled, "])
def test_a_sparse_plan_gives_what_transformers_gives_for_rounded_keys_and_values(ran, scales):
    run = ran[f"{scales}sparse"]
    assert run["counted"][0] < run["counted"][1]
    assert run["tokens"] == ran[f"{scales}reference"]["tokens"]
    assert run["tokens"] != ran["not rounded"]["tokens"], "float8 has to show"


def test_rule14_sixteen_drafts_change_no_token(ran):
    assert ran["16 drafts"]["tokens"] == ran["stock"]["tokens"]
    assert ran["16 drafts"]["drafted"] > 0


def test_scales_show(ran):
    assert ran["sparse"]["tokens"] != ran["scaled, sparse"]["tokens"]
    assert ran["stock"]["tokens"] != ran["scaled, stock"]["tokens"]


def test_a_second_turn_finds_its_prefix(ran):
    run = ran["scaled, two turns"]
    assert sum(run["cached"]) > 0
    assert run["tokens"] == ran["scaled, sparse"]["tokens"]


@pytest.mark.parametrize("kind", ["auto", "fp8"])
def test_a_second_turn_finds_the_answer_of_the_first(ran, kind):
    """Keys and values of decoded tokens are reused: they come from a plan, not from a prefill."""
    run = ran[f"{kind}, answered"]
    assert run["cached"] == [96, 64]
    assert run["tokens"] == ran[f"{kind}, answered, reference"]["tokens"]
    if kind == "auto":
        assert run["tokens"] != ran["auto, answered, prefilled"]["tokens"]
