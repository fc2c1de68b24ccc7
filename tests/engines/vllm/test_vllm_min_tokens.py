"""``min_tokens`` above the budget of pages: short rows read everything, longer ones are sparse."""

import pytest
from tiny_runs import PROMPTS, SPARSE

from deltadecode import DeltaConfig
from deltadecode.engines.serving.counts import attended_tokens
from deltadecode.engines.serving.settings import ServingSettings

# The first prompt passes it with its 15th token, the second with its 34th: rows of both kinds.
LEAST = 75
N_GRAM = {
    "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2,
}  # fmt: skip
BLOCKS = {"block_size": 32}
RUN = {"model": "llama", "prompts": PROMPTS, "max_tokens": 40, "engine": BLOCKS, "logprobs": None}
PLANNED = {**RUN, "config": {**SPARSE, "min_tokens": LEAST}}
RUNS = {
    "stock": RUN,
    "sparse": {**RUN, "config": SPARSE},
    "all short": {**RUN, "config": {**SPARSE, "min_tokens": 200}},
    "some short": PLANNED,
    "some short, drafts": {**PLANNED, "engine": {**BLOCKS, "speculative_config": N_GRAM}},
}


@pytest.fixture(scope="module")
def ran(tiny):
    found = tiny(RUNS, fork=True)
    errors = {name: run["error"] for name, run in found.items() if "error" in run}
    assert not errors
    return found


def test_rows_below_it_read_everything(ran):
    run = ran["all short"]
    assert run["counted"][0] == run["counted"][1] > 0
    assert run["tokens"] == ran["stock"]["tokens"] != ran["sparse"]["tokens"]


@pytest.mark.parametrize("case", ["some short", "some short, drafts"])
def test_rows_below_it_read_everything_beside_longer_ones_that_do_not(ran, case):
    run, stock, sparse = ran[case], ran["stock"], ran["sparse"]
    assert (run["drafted"] > 0) == ("drafts" in case)
    assert run["counted"] == counts_of(run["batches"])
    for prompt, found, full, few in zip(
        PROMPTS, run["tokens"], stock["tokens"], sparse["tokens"], strict=True
    ):
        # A step that has 75 tokens to read is the first sparse one; its token comes after those.
        short = LEAST - len(prompt)
        assert found[:short] == full[:short] != few[:short]
        assert found != full, "rows above have to show"


def test_drafts_across_it_change_no_token(ran):
    assert ran["some short, drafts"]["tokens"] == ran["some short"]["tokens"]


def counts_of(batches):
    """What the decode rows of these batches read, and what there was, by the plan."""
    config = DeltaConfig(**SPARSE)
    plan = config.layer_plan(4, (0, 1, 2, 3))
    settings = ServingSettings(config, plan, min_tokens=LEAST)
    rows = [row for batch in batches for row in zip(*batch, strict=True)]
    attended = full = 0
    for new, length in rows:
        for tokens in range(length - new + 1, length + 1) if length > new else ():
            one, all_of_it = attended_tokens(settings, tokens)
            attended, full = attended + one, full + all_of_it
    return [attended, full]
