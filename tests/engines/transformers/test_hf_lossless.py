"""Lossless mode: sparse steps draft, full attention verifies, and nothing is lost (R12 to R14)."""

import copy
from typing import Any

import pytest
import torch
from hf_tiny import VOCAB, generate, make_model, make_prompt, small_config
from scipy.stats import chisquare
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import deltadecode as dd
from deltadecode.engines.transformers import acceptance, lossless

PROMPT, STEPS = 23, 24
# Two equal rows, one that stays within the budget of 20 tokens at first, and one of a single token.
LENGTHS = (23, 9, 1, 23, 34)
FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "gpt_oss"]


def models(family: str = "llama", draft_tokens: int = 4, **changes: Any) -> tuple[Any, Any]:
    """A stock model, and the same one in lossless mode."""
    stock = make_model(family, "eager" if family in ("gemma2", "gpt_oss") else "sdpa").double()
    ours = copy.deepcopy(stock)
    dd.enable(ours, small_config(family, **changes), lossless=True, draft_tokens=draft_tokens)
    return stock, ours


def left_padded(lengths: tuple[int, ...] = LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        tokens[row, -length:] = make_prompt(length, seed=row)[0]
        mask[row, -length:] = 1
    return tokens, mask


def same(ours: Any, stock: Any) -> None:
    assert torch.equal(ours.sequences, stock.sequences)
    expected = torch.stack(stock.logits)
    torch.testing.assert_close(torch.stack(ours.logits), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draft_tokens", [1, 4, 16])
def test_rule14_greedy_output_is_that_of_full_attention(family: str, draft_tokens: int) -> None:
    stock, ours = models(family, draft_tokens)
    tokens, mask = left_padded()
    for options in ({}, {"attention_mask": mask}):
        inputs = tokens if options else make_prompt(PROMPT)
        same(generate(ours, inputs, STEPS, **options), generate(stock, inputs, STEPS, **options))
    counts = dd.stats(ours)
    assert 0 < counts.accepted < counts.verified <= counts.drafted  # some drafts were wrong
