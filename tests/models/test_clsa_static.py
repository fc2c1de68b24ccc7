"""Steps of fixed shapes, through the operations: against one pass over the whole sequence."""

import functools
from types import SimpleNamespace

import pytest
import torch
from clsa_models import make_model

from deltadecode import ops
from deltadecode.errors import ArgumentError, UnsupportedCacheError
from deltadecode.models.clsa import ClsaStaticCache, decode
from deltadecode.ops import tokens

MODES = ("clsa", "yoco", "transformer")


def _ids(rows, tokens):
    return torch.randint(1, 64, (rows, tokens))


@pytest.mark.parametrize("mode", MODES)
def test_generate_with_a_static_cache_writes_the_same(mode):
    model, lengths = make_model(mode=mode), (2, 15, 9)
    ids = _ids(3, 15)
    mask = torch.stack([torch.arange(15) >= 15 - length for length in lengths]).long()
    for given in ({}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        made = []
        for kind in (None, "static"):
            torch.manual_seed(0)
            options = {"do_sample": False, "max_new_tokens": 8} | given
            made.append(
                model.generate(ids, attention_mask=mask, cache_implementation=kind, **options)
            )
        assert made[0].tolist() == made[1].tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompt", [1, 4, 5, 17])
@torch.no_grad()
def test_steps_are_one_pass_over_the_whole_sequence(mode, prompt):
    model, ids = make_model(mode=mode, sliding_window=5 if prompt > 1 else 1), _ids(2, 24)
    whole = model(ids).logits
    cache = ClsaStaticCache(model.config, 2, 24, torch.float64, ids.device)
    logits = [model(ids[:, :prompt], past_key_values=cache).logits]
    for t in range(prompt, 24):
        logits.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole[:, prompt - 1 :], rtol=1e-9, atol=1e-9)
    with pytest.raises(UnsupportedCacheError, match="of 24 tokens has no room for 25"):
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_the_kernels_compute_a_step(mode, monkeypatch):
    pytest.importorskip("triton", exc_type=ModuleNotFoundError)
    model, ids = make_model(torch.float32, mode=mode), _ids(2, 14)
    exact = make_model(mode=mode)
    names, used = ("decode_attention", "index_scores", "select_pages"), []

    def kernel(name, *arguments, **options):
        used.append(name)
        return getattr(ops, name)(*arguments, **options, backend="triton")

    kernels = {name: functools.partial(kernel, name) for name in names}
    monkeypatch.setattr(decode, "ops", SimpleNamespace(**kernels))
    for name in names[1:]:
        monkeypatch.setattr(tokens, name, kernels[name])
    cache = ClsaStaticCache(model.config, 2, 20, torch.float32, ids.device)
    model(ids[:, :11], past_key_values=cache)
    used.clear()
    steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(11, 14)]
    wanted = exact(ids).logits[:, 11:]
    torch.testing.assert_close(torch.cat(steps, 1).double(), wanted, rtol=1e-4, atol=1e-4)
    # Attention of four layers, one index for two of them.
    assert used.count("decode_attention") == 12
    assert used.count("index_scores") == used.count("select_pages") == (3 if mode == "clsa" else 0)


@torch.no_grad()
def test_what_a_static_cache_cannot_do_is_refused():
    model, ids = make_model(), _ids(2, 6)
    for rows, most, name in ((0, 10, "rows"), (2, 10.0, "max_length"), (2, -1, "max_length")):
        with pytest.raises(ArgumentError, match=f"{name} must be an int of 1 or more"):
            ClsaStaticCache(model.config, rows, most, torch.float64, ids.device)
    with pytest.raises(ArgumentError, match="config must be a ClsaConfig, got ClsaForCausalLM"):
        ClsaStaticCache(model, 2, 10, torch.float64, ids.device)
    cache = ClsaStaticCache(model.config, 2, 10, torch.float64, ids.device)
    with pytest.raises(UnsupportedCacheError, match="of 2 rows got a batch of 1"):
        model(ids[:1], past_key_values=cache)
    model(ids, past_key_values=cache)
    with pytest.raises(UnsupportedCacheError, match=r"takes one token a row .* got \[2, 6\]"):
        model(ids, past_key_values=cache)
    with pytest.raises(UnsupportedCacheError, match="cannot take tokens back"):
        cache.crop(1)
    with pytest.raises(UnsupportedCacheError, match="only ClsaForCausalLM decodes from a"):
        model.model(ids[:, :1], past_key_values=cache)
