"""On a GPU, decode steps that read everything go through the operations, not the stock function."""

import pytest
import torch
from hf_tiny import FAMILIES, generate, make_model, make_prompt, small_config, stock_name

import deltadecode as dd
from deltadecode.engines.transformers import attention
from deltadecode.engines.transformers.state import ROLE
from deltadecode.engines.transformers.step import Rows


@pytest.fixture
def stock(monkeypatch):
    """Planned layers that called the stock function at a decode step; as on a GPU."""
    monkeypatch.setattr(attention, "_kernels_read", lambda query, key: True)
    called, full = [], attention.full_attention

    def noted(module, query, *arguments, **options):
        role = getattr(module, ROLE, None)
        if query.shape[2] == 1 and role is not None and role.kind != "own":
            called.append(role.kind)
        return full(module, query, *arguments, **options)

    monkeypatch.setattr(attention, "full_attention", noted)
    return called


def run(model, prompt, steps, cache=None):
    dd.stats(model).reset()
    out = generate(model, prompt, steps, past_key_values=cache)
    return out.sequences, torch.stack(out.logits), dd.stats(model).per_layer


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_counts_are_those_of_the_stock_function(family, stock, monkeypatch):
    model = make_model(family, stock_name(family)).double()
    dd.enable(model, small_config(family))
    prompt = make_prompt(12)  # within the budget at first, beyond it later
    ours = run(model, prompt, 24)
    assert not stock
    monkeypatch.undo()
    theirs = run(model, prompt, 24)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])
    assert ours[2] == theirs[2]


def test_rows_that_start_elsewhere_stay_with_it(stock):
    model = make_model("llama", "sdpa").double()
    dd.enable(model, small_config("llama"))
    prompt = make_prompt(40, rows=2)
    mask = torch.ones_like(prompt)
    mask[1, :9] = 0
    generate(model, prompt, 4, attention_mask=mask)
    assert set(stock) == {"dense"}


@pytest.mark.parametrize(
    ("mask", "together"),
    [(None, True), ([[1, 1, 1]] * 2, True), ([[0, 1, 1]] * 2, False), ([[1, 0, 1]] * 2, False)],
)
def test_rows_are_together_where_every_slot_has_a_token(mask, together):
    cfg, key = small_config("llama"), torch.zeros(2, 2, 3, 8)
    seen = None if mask is None else torch.tensor(mask).bool()[:, None, None]
    assert Rows.of(cfg, key, seen).together == together
