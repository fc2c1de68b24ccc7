"""Every type of causal language model in Transformers, tiny and random: right, or refused.

A few types run with the other tests, all of them by ``make sweep``.
"""

from pathlib import Path

import pytest
import transformers
from hf_sweep import outcome
from hf_table import TYPES, read

# Libraries warn of much that a tiny random model has.
pytestmark = pytest.mark.filterwarnings("ignore")

RUN = (
    *("llama", "gemma2", "gpt_oss", "gemma4_text", "qwen3_next", "bart", "gpt2", "mllama"),
    "afmoe",  # takes the output of attention as contiguous
)
REFUSED = {
    "deepseek_v3": "multi-head latent attention",
    "diffllama": "more than once a step",
    "minimax_m3_vl_text": "passes block_indices to its attention function",
    "hrm_text": "layer 0 has 2 causal self-attention",
}


@pytest.mark.parametrize("model_type", RUN)
def test_a_type_that_runs_is_stock_within_the_budget_and_delta_past_it(model_type: str) -> None:
    assert outcome(model_type) == "runs"


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_type_that_delta_cannot_serve_is_refused_in_one_line(model_type: str) -> None:
    told = outcome(model_type)
    assert told.startswith("refused: ")
    assert REFUSED[model_type] in told


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_does_what_the_docs_say(model_type: str) -> None:
    version, table = read()
    if version != transformers.__version__:
        # Another version may refuse more or less; what runs must be right all the same.
        outcome(model_type)
        return
    assert outcome(model_type) == table[model_type]


def test_the_table_in_the_docs_has_every_type_of_the_pinned_transformers() -> None:
    version, table = read()
    pins = (Path(__file__).parents[3] / "constraints.txt").read_text(encoding="utf-8")
    assert f"transformers=={version}" in pins, "make the table anew: hf_table.py --write"
    if version != transformers.__version__:
        pytest.skip(f"the table is of Transformers {version}, not {transformers.__version__}")
    assert set(table) == set(TYPES)
