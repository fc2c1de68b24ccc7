"""Which chunks of a prompt go without a mask, and that they are what masked ones are."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import deltadecode as dd
from deltadecode.engines.transformers import full, masks

ONES = torch.ones(2, 12, dtype=torch.bool)
CHUNK = {
    "batch_size": 2, "q_length": 4, "kv_length": 12, "q_offset": 8, "kv_offset": 0,
    "attention_mask": ONES, "dtype": torch.bfloat16, "device": "cuda",
}  # fmt: skip
PADDED = ONES.clone()
PADDED[1, :3] = False


@pytest.fixture
def stock(monkeypatch):
    """What Transformers' function is asked for; it answers with the word."""
    asked = []

    def sdpa_mask(*args, **kwargs):
        asked.append((args, kwargs))
        return "a mask"

    monkeypatch.setattr(masks, "sdpa_mask", sdpa_mask)
    return asked


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attention_mask": None},
        {"dtype": torch.float16},
        {"attention_mask": torch.ones(2, 20, dtype=torch.bool)},
        {"local_size": 13},
    ],
)
def test_a_chunk_without_padding_has_no_mask(stock, change):
    assert masks.delta_mask(**CHUNK | change) is None
    assert not stock


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cpu"},
        {"dtype": torch.float32},
        {"dtype": None},
        {"q_length": 1, "q_offset": 11},
        {"attention_mask": PADDED},
        {"local_size": 12},
        {"allow_is_causal_skip": False},
        # A static cache: slots behind the last token, and an offset that is a tensor.
        {"kv_length": 16, "attention_mask": torch.ones(2, 16, dtype=torch.bool)},
        {"q_offset": torch.tensor(8)},
        # A window that has moved on.
        {"kv_offset": 3, "kv_length": 9},
    ],
)
def test_others_have_the_mask_of_sdpa(stock, change):
    given = CHUNK | change
    assert masks.delta_mask(**given) == "a mask"
    ((args, kwargs),) = stock
    names = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset")
    asked = dict(zip(names, args, strict=True)) | kwargs
    given = {"local_size": None, "allow_is_causal_skip": True} | given
    assert asked.keys() == given.keys()
    assert all(asked[name] is given[name] for name in asked)


@pytest.mark.parametrize("lengths", [(37, 37), (37, 20)])
@pytest.mark.parametrize("flash", [False, True])
def test_a_prompt_in_chunks_is_the_prompt(monkeypatch, lengths, flash):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    plan = dd.DeltaConfig(
        page_size=4, budget_pages=3, recent_pages=1, dense_layers=(0,), delta_layers=(1,)
    )
    dd.enable(model, plan)
    tokens = torch.randint(1, 64, (2, 37))
    mask = torch.arange(37) >= 37 - torch.tensor(lengths)[:, None]

    def run():
        return model.generate(
            tokens, attention_mask=mask.long(), prefill_chunk_size=10, max_new_tokens=6,
            do_sample=False, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip

    expected = run()
    bare, last = [], full._last_queries
    monkeypatch.setattr(masks, "_on_gpu", lambda device: True)
    if flash:
        monkeypatch.setattr(full, "_flash_reads", lambda *_: True)

        def noted(query, key, value, scale):
            bare.append((query.shape[2], key.shape[2]))
            return last(query, key, value, scale)

        monkeypatch.setattr(full, "_last_queries", noted)
    got = run()
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(expected.logits), rtol=0, atol=0
    )
    assert torch.equal(got.sequences, expected.sequences)
    chunks = [chunk for chunk in [(10, 20), (10, 30), (7, 37)] for _ in range(4)]
    assert bare == (chunks if flash and min(lengths) == 37 else [])
