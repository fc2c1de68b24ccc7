"""Drafters that read the hidden states of a model change no token of a sparse plan (R10)."""

import pytest
from tiny_runs import PROMPTS, SPARSE

RUN = {
    "prompts": PROMPTS, "max_tokens": 30, "logprobs": None, "engine": {"block_size": 32},
}  # fmt: skip
# Of random weights, drafts are random: next to none is accepted.
DRAFTERS = {"eagle": ("llama", 3), "eagle3": ("llama", 3), "mtp": ("glm4_moe", 2)}


@pytest.fixture(scope="module")
def ran(tiny):
    runs = {}
    for model in ("llama", "glm4_moe"):
        runs[f"{model}, stock"] = {**RUN, "model": model}
        runs[model] = {**RUN, "model": model, "config": SPARSE}
    for kind, (model, drafts) in DRAFTERS.items():
        runs[kind] = {**runs[model], "drafter": kind, "drafts": drafts}
    return tiny(runs, fork=True)


@pytest.mark.parametrize("kind", DRAFTERS)
def test_rule10_drafts_from_hidden_states_change_no_token(ran, kind):
    model, drafts = DRAFTERS[kind]
    run, alone, stock = ran[kind], ran[model], ran[f"{model}, stock"]
    assert "error" not in run, run["error"]
    assert run["drafted"] > 0
    assert max(new for news, lengths in run["batches"] for new in news if new < 41) == drafts + 1
    assert 0 < run["counted"][0] < run["counted"][1]
    assert run["tokens"] == alone["tokens"] != stock["tokens"]
