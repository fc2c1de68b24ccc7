"""Lossless mode samples from full attention's distribution, whatever its drafts are (R13)."""

import pytest
import torch
from tiny_worker import make
from transformers import AutoModelForCausalLM

from deltadecode_vllm import PROPOSER

PROMPT = [5 + 7 * (place % 9) % 50 for place in range(60)]
# All pages of eight but one or two: drafts are often wrong, and often right.
STARVED = {"page_size": 8, "budget_pages": 7, "recent_pages": 1, "sink_pages": 0, "min_tokens": 0}
DRAWS, TOKENS, TEMPERATURE = 2000, 3, 1.0
LEAST = 25  # draws that are expected of a group of texts


@pytest.fixture(scope="module")
def ran(tiny):
    drafting = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 2}
    engine = {
        "speculative_config": drafting, "block_size": 32, "enable_prefix_caching": True,
        "max_num_seqs": 256,
    }  # fmt: skip
    run = {
        "model": "llama", "config": STARVED, "engine": engine, "prompts": [PROMPT] * DRAWS,
        "max_tokens": TOKENS, "logprobs": None,
        "params": {"temperature": TEMPERATURE},
    }  # fmt: skip
    found = tiny({"lossless": run})["lossless"]
    assert "error" not in found, found["error"]
    return found


def shares_of_texts(folder):
    """Probability of every text that may be drawn, by full attention: [vocabulary] * TOKENS."""
    model = AutoModelForCausalLM.from_pretrained(make("llama", folder), dtype=torch.float32)
    shares, texts = torch.ones(()), torch.empty(1, 0, dtype=torch.int64)
    for _ in range(TOKENS):
        prompts = torch.tensor([PROMPT]).expand(len(texts), -1)
        with torch.inference_mode():
            logits = model(torch.cat([prompts, texts], 1), logits_to_keep=1).logits[:, -1]
        after = (logits / TEMPERATURE).softmax(-1)
        tokens = torch.arange(after.shape[1]).expand(len(texts), -1)
        texts = torch.cat([texts.repeat_interleave(after.shape[1], 0), tokens.reshape(-1, 1)], 1)
        shares = shares[..., None] * after.view(*shares.shape, -1)
    return shares


def test_rule13_texts_are_drawn_as_often_as_full_attention_gives_them(ran, tmp_path):
    shares = shares_of_texts(tmp_path)
    drawn = torch.zeros_like(shares)
    for text in ran["tokens"]:
        drawn[tuple(text)] += 1
    wanted, order = (shares.flatten() * DRAWS).sort(descending=True)
    # Rare texts are taken together, until so many of a group are expected.
    groups = wanted.cumsum(0).sub(wanted / 2).div(LEAST).long()
    known = torch.zeros(int(groups[-1]) + 1)
    expected = known.index_add(0, groups, wanted)
    seen = known.index_add(0, groups, drawn.flatten()[order])
    kept = expected > LEAST / 4
    chi = float(((seen - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum())
    # Once in a thousand times it is above that (Wilson and Hilferty).
    most = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert freedom > 20 and chi < most, (freedom, chi, most)
    assert 0.1 * ran["drafted"] < ran["accepted"] < 0.9 * ran["drafted"]
