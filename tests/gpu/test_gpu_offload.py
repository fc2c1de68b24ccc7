"""The cache of sparse layers on the host, on a GPU: what ``DeltaCache`` gives, bit for bit."""

import copy
from dataclasses import replace

import offload_cases
import pytest
import torch
from test_gpu_transformers import CFG, LENGTHS, SHAPE, SHARE, left_padded, make

import deltadecode as dd
from deltadecode.engines.transformers import offload_host
from deltadecode.engines.transformers.offload_host import CudaTransfer
from deltadecode.engines.transformers.offload_layer import OffloadedLayer

pytestmark = pytest.mark.gpu

NO_RECENT = replace(CFG, recent_pages=0)


def run(model, tokens, mask, steps, cache, **options):
    dd.stats(model).reset()
    out = model.generate(
        tokens, attention_mask=mask, max_new_tokens=steps, do_sample=False, past_key_values=cache,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    stats = dd.stats(model)
    return out.sequences, torch.stack(out.logits), stats.per_layer, stats.offload.hit_rate


def assert_same(model, pair, tokens, mask, steps=40, **options):
    """Both caches give the same bits, and hold them; gives the tokens, and the first's hit rate."""
    ours, plain = (run(model, tokens, mask, steps, cache, **options) for cache in pair)
    equal = (ours[1] == plain[1]).flatten(1).all(dim=1)
    assert equal.all(), f"first other logits at step {equal.int().argmin()}"
    assert torch.equal(ours[0], plain[0])
    assert ours[2] == plain[2]
    for left, right in zip(pair[0].layers, pair[1].layers, strict=True):
        assert torch.equal(left.keys.cpu(), right.keys.cpu())
        assert torch.equal(left.values.cpu(), right.values.cpu())
    return ours[0], ours[3]


def caches(model, cfg=CFG, **options):
    ours = dd.DeltaOffloadedCache(model.config, cfg, transfer=CudaTransfer(**options))
    return ours, dd.DeltaCache(model.config)


def sparse(cache):
    return [layer for layer in cache.layers if isinstance(layer, OffloadedLayer)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cfg", [CFG, SHARE, NO_RECENT])
@pytest.mark.parametrize("gather", [True, False])
def test_the_bits_are_those_of_the_default_cache(dtype, cfg, gather):
    model = make("llama", dtype, cfg)
    pair = caches(model, cfg, gather=gather)
    tokens, _ = left_padded((230,))
    _, hit_rate = assert_same(model, pair, tokens, None, 120)
    assert all(layer.offloaded for layer in sparse(pair[0]))
    assert pair[0].shared.transfer.pinned
    assert 0 < hit_rate < 1


def test_a_short_prompt_moves_out_and_the_kernel_writes_its_tokens(monkeypatch):
    from deltadecode.engines.transformers import offload_kernel

    append, written = offload_kernel.append_token, []

    def noted(host, token, *states):
        written.append(token)
        append(host, token, *states)

    monkeypatch.setattr(offload_kernel, "append_token", noted)
    model = make("llama", torch.bfloat16)
    tokens, _ = left_padded((90, 90))
    assert_same(model, caches(model), tokens, None, 41)
    # The budget is 96 tokens; a slot is written in each of three sparse layers.
    assert sorted(written) == sorted([*range(96, 130)] * 3)


def test_hits_are_counted_and_pages_fetched():
    model = make("qwen2", torch.bfloat16)
    tokens, mask = left_padded()
    run(model, tokens, mask, 40, dd.DeltaOffloadedCache(model.config, CFG))
    stats = dd.stats(model).offload
    assert stats.steps == 39
    assert 0 < stats.fetched_pages < stats.read_pages
    run(model, tokens, mask, 40, None, cache_implementation="offloaded")
    assert stats.steps == 39


@pytest.mark.parametrize("cfg", [CFG, SHARE])
def test_padded_batches_that_are_cropped_copied_and_go_on(cfg):
    model = make("llama", torch.bfloat16, cfg)
    tokens, mask = left_padded()
    pair = caches(model, cfg)
    first, _ = assert_same(model, pair, tokens, mask)
    for cache in pair:
        cache.crop(-11)
    ones = torch.ones(3, first.shape[1] - tokens.shape[1], dtype=torch.long, device="cuda")
    mask = torch.cat([mask, ones], dim=1)[:, : first.shape[1] - 12]
    more, more_mask = left_padded((9, 4, 7))
    tokens = torch.cat([first[:, : mask.shape[1]], more], dim=1)
    mask = torch.cat([mask, more_mask], dim=1)
    twins = tuple(copy.deepcopy(cache) for cache in pair)
    assert_same(model, pair, tokens, mask)
    assert_same(model, twins, tokens, mask)
    assert_same(model, caches(model, cfg), tokens, mask, 20, prefill_chunk_size=50)


def same_by(model):
    """What the cases of offload_cases.py call."""
    return lambda *arguments, **options: assert_same(model, *arguments, **options)[0]


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("lengths", [(230, 230), (230, 101)])
def test_beam_search(lengths, gather):
    model = make("llama", torch.bfloat16)
    pair = caches(model, gather=gather)
    offload_cases.beam_search(same_by(model), pair, *left_padded(lengths), 40)
    assert all(layer.offloaded for layer in sparse(pair[0]))


# Beyond the budget of 96 tokens, and within it until the rows are chosen.
@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("lengths", [(230, 230, 230), LENGTHS, (60, 37, 20)])
@pytest.mark.parametrize("choice", offload_cases.CHOICES)
def test_other_rows_decode_on(choice, lengths, gather):
    model = make("llama", torch.bfloat16)
    pair = caches(model, gather=gather)
    offload_cases.other_rows(same_by(model), pair, *left_padded(lengths), 30, choice)
    assert all(layer.offloaded for layer in sparse(pair[0]))


@pytest.mark.parametrize("cfg", [CFG, SHARE])
@pytest.mark.parametrize("twin_of", offload_cases.TWINS.values(), ids=offload_cases.TWINS)
def test_a_copy_goes_on_by_itself(twin_of, cfg):
    model = make("llama", torch.bfloat16, cfg)
    pair = caches(model, cfg)
    same = same_by(model)
    twins = offload_cases.a_copy_goes_on(same, pair, *left_padded(), 40, twin_of)
    for cache in (pair[0], twins[0]):
        assert all(layer._host.is_pinned() for layer in sparse(cache))


def test_memory_that_is_not_pinned_gives_the_same(monkeypatch):
    monkeypatch.setattr(offload_host, "_pin", lambda tensor: False)
    model = make("llama", torch.bfloat16)
    pair = caches(model)
    tokens, _ = left_padded((230,))
    with pytest.warns(UserWarning, match="refused to pin"):
        assert_same(model, pair, tokens, None)


def test_an_error_of_pinning_reaches_nobody_else():
    tensor = torch.empty(1 << 20)
    assert offload_host._pin(tensor)
    assert not offload_host._pin(tensor)
    assert torch.ones(3, device="cuda").sum() == 3
    assert tensor.is_pinned()


def test_caches_that_are_dropped_while_copies_run():
    model = make("llama", torch.bfloat16)
    tokens = torch.randint(2, SHAPE["vocab_size"], (1, 2000), device="cuda")
    with torch.no_grad():
        for _ in range(20):
            cache = dd.DeltaOffloadedCache(model.config, CFG)
            model(tokens, past_key_values=cache, logits_to_keep=1)
            del cache
    torch.cuda.synchronize()


def test_the_device_holds_pools_and_full_layers_alone():
    model = make("llama", torch.bfloat16)
    ours = dd.DeltaOffloadedCache(model.config, CFG)
    tokens, heads, dim = 200_000, SHAPE["num_key_value_heads"], SHAPE["head_dim"]
    of_layer = 2 * tokens * heads * dim * 2
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for layer in range(6):
        states = [torch.randn(1, heads, tokens, dim, device="cuda").bfloat16() for _ in range(2)]
        ours.update(*states, layer)
        del states
    ours.shared.transfer.settle()
    with torch.no_grad():
        for _ in range(3):
            model(torch.ones(1, 1, dtype=torch.long, device="cuda"), past_key_values=ours)
    # One dense layer and two Δ-layers of six.
    assert ours.device_bytes < 3.2 * of_layer
    assert torch.cuda.memory_allocated() - before < 3.3 * of_layer
    assert ours.host_bytes > 3 * of_layer
    del ours
    torch.cuda.synchronize()
