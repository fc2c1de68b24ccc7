"""Tiny random models of many families: vLLM gives the tokens of the Transformers integration."""

import pytest
from tiny_runs import PROMPTS, SPARSE

ALTERNATING = {**SPARSE, "dense_layers": [1], "delta_layers": [3]}
PLANS = {
    "gpt_oss": ALTERNATING,  # attention sinks; windows
    "gemma2": ALTERNATING,  # capped logits
    "gemma3": ALTERNATING,
    "gemma3n": ALTERNATING,  # layers 5 and 7 read the cache of 3, a Δ-layer
    "gemma4": ALTERNATING,  # heads of another size in full-attention layers
    "llama4": ALTERNATING,  # chunks
    "llama with LoRA": SPARSE,
    "phi": SPARSE,  # a window that hides nothing
}


# A chunk of Llama 4's attention has whole blocks.
RUN = {"prompts": PROMPTS, "max_tokens": 40, "logprobs": None, "engine": {"block_size": 32}}
# vLLM's linear attention on CPUs takes bfloat16 alone, in which sums in another order turn ties.
LINEAR = {**RUN, "model": "qwen3_next", "engine": {"dtype": "bfloat16"}}
WINDOWS = {**RUN, "model": "windows"}


@pytest.fixture(scope="module")
def ran(tiny):
    runs = {}
    for model, config in PLANS.items():
        run = {**RUN, "model": model.split()[0], "config": config, "lora": "LoRA" in model}
        everything = {**config, "budget_pages": 32}
        runs[f"{model}, vLLM"] = run
        runs[f"{model}, Transformers"] = {**run, "side": "transformers"}
        runs[f"{model}, all pages"] = {**run, "side": "transformers", "config": everything}
    runs["linear, stock"] = LINEAR
    runs["linear, all pages"] = {**LINEAR, "config": {**ALTERNATING, "budget_pages": 32}}
    runs["linear, sparse"] = {**LINEAR, "config": ALTERNATING}
    runs["linear, Transformers"] = {**LINEAR, "config": ALTERNATING, "side": "transformers"}
    runs["windows, stock"] = WINDOWS
    runs["windows, stock if told"] = {**WINDOWS, "config": {"on_unsupported": "stock"}}
    return tiny(runs, fork=True)


@pytest.mark.parametrize("model", PLANS)
def test_greedy_tokens_equal_those_of_the_transformers_integration(ran, model):
    run, expected = ran[f"{model}, vLLM"], ran[f"{model}, Transformers"]
    assert "error" not in run, run["error"]
    attended, full = run["counted"]
    assert 0 < attended < full
    assert run["tokens"] == expected["tokens"] != ran[f"{model}, all pages"]["tokens"]


def test_full_attention_between_linear_layers_is_planned(ran):
    kinds = ("stock", "all pages", "sparse", "Transformers")
    stock, everything, sparse, expected = (ran[f"linear, {kind}"] for kind in kinds)
    if "error" in stock:
        pytest.skip(f"stock vLLM does not run it on this CPU: {stock['error']}")
    assert "error" not in everything, everything["error"]
    assert everything["counted"][0] == everything["counted"][1] > sparse["counted"][0] > 0
    begins = [run["tokens"][0][:8] for run in (stock, everything, sparse, expected)]
    assert begins[0] == begins[1] != begins[2] == begins[3]


def test_a_model_with_nothing_to_plan_is_served_stock_if_told(ran):
    run = ran["windows, stock if told"]
    assert "error" not in run, run["error"]
    assert (run["tokens"], run["counted"]) == (ran["windows, stock"]["tokens"], [0, 0])
