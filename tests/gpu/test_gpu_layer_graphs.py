"""Layer graphs on a GPU: the bits of layers that run as they are, from fewer launches."""

import copy
import gc
import threading

import pytest
import torch
from test_gpu_transformers import CFG, LENGTHS, SHAPE, left_padded
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import deltadecode as dd
from deltadecode.engines.transformers.layer_graphs import LayerForward

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "gemma2": (
        Gemma2Config,
        {"layer_types": ["full_attention"] * 5 + ["sliding_attention"], "sliding_window": 50},
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 128, "num_experts_per_tok": 2},
    ),
}
ALONE = (230,)
STEPS = 40


def make(family="qwen3", dtype=torch.bfloat16, **options):
    """The same model twice: with layer graphs, and without."""
    kind, values = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        kind(**SHAPE, **values),
        attn_implementation="eager" if family == "gemma2" else "sdpa",
        **options,
    )
    model = model.to(DEVICE, dtype).eval()
    twin = copy.deepcopy(model)
    dd.enable(model, CFG, layer_graphs=True)
    dd.enable(twin, CFG)
    return model, twin


def cache_of(model, kind, kv_dtype=None):
    if kind == "default":
        return dd.DeltaCache(model.config, kv_dtype=kv_dtype)
    return dd.DeltaOffloadedCache(model.config, CFG, kv_dtype=kv_dtype)


def run(model, tokens, mask, cache=None, steps=STEPS, **options):
    dd.stats(model).reset()
    torch.manual_seed(0)
    out = model.generate(
        tokens, attention_mask=mask, max_new_tokens=steps, past_key_values=cache,
        return_dict_in_generate=True, output_logits=True, **{"do_sample": False, **options},
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits), dd.stats(model).per_layer


def assert_same(pair, tokens, mask, caches=(None, None), **options):
    """Both models give the same bits; gives the tokens."""
    ours, plain = (
        run(model, tokens, mask, cache, **options)
        for model, cache in zip(pair, caches, strict=True)
    )
    equal = (ours[1] == plain[1]).flatten(1).all(dim=1)
    assert equal.all(), f"first other logits at step {equal.int().argmin()}"
    assert torch.equal(ours[0], plain[0])
    assert ours[2] == plain[2]
    return ours[0]


def forwards(model):
    found = [vars(layer)["forward"] for layer in model.model.layers]
    assert all(isinstance(forward, LayerForward) for forward in found)
    return found


def recorded(model):
    """How many recordings each layer has; all layers have as many."""
    (count,) = {
        sum(recording is not None for recording in forward.recordings.values())
        for forward in forwards(model)
    }
    return count


@pytest.mark.parametrize("kind", ["default", "offloaded"])
@pytest.mark.parametrize("lengths", [ALONE, LENGTHS])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3_moe"])
def test_the_bits_are_those_of_layers_that_run_as_they_are(family, lengths, kind):
    model, twin = make(family)
    tokens, mask = left_padded(lengths)
    caches = [cache_of(each, kind) for each in (model, twin)]
    assert_same((model, twin), tokens, mask, caches)
    assert recorded(model) == 1
    assert dd.stats(model).attended_fraction < 0.9


@pytest.mark.parametrize("kind", ["default", "offloaded"])
def test_replays_after_a_crop_and_from_other_caches(kind):
    model, twin = make()
    tokens, mask = left_padded(LENGTHS)
    caches = [cache_of(each, kind) for each in (model, twin)]
    first = assert_same((model, twin), tokens, mask, caches)
    for cache in caches:
        cache.crop(-11)
    tokens = first[:, :-12]
    more = torch.randint(2, 500, (3, 2), device=tokens.device)
    ones = torch.ones(
        3, tokens.shape[1] + 2 - mask.shape[1], dtype=torch.long, device=tokens.device
    )
    tokens, mask = torch.cat([tokens, more], dim=1), torch.cat([mask, ones], dim=1)
    assert_same((model, twin), tokens, mask, caches)
    assert_same((model, twin), tokens, mask)
    assert recorded(model) == 1


@pytest.mark.parametrize("kind", ["default", "offloaded"])
def test_from_within_the_budget_in_eight_bits(kind):
    model, twin = make()
    tokens, mask = left_padded((60,))
    caches = [cache_of(each, kind, "int8") for each in (model, twin)]
    assert_same((model, twin), tokens, mask, caches, steps=80)
    assert recorded(model) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types(dtype):
    model, twin = make("llama", dtype)
    assert_same((model, twin), *left_padded(LENGTHS))
    assert recorded(model) == 1


def test_batches_in_turns_and_ways_to_generate():
    model, twin = make()
    for lengths in (ALONE, LENGTHS, (64, 64), ALONE, LENGTHS):
        assert_same((model, twin), *left_padded(lengths), steps=10)
    assert recorded(model) == 3
    for options in ({"do_sample": True}, {"num_beams": 2}, {"prefill_chunk_size": 100}):
        assert_same((model, twin), *left_padded(LENGTHS), **options)


def test_experts_that_the_host_sends_tokens_to_run_as_they_are():
    model, twin = make("qwen3_moe", experts_implementation="eager")
    with pytest.warns(UserWarning, match="waits for the GPU"):
        assert_same((model, twin), *left_padded(LENGTHS))
    assert all(forward.refused for forward in forwards(model))
    # Captures that were given up leave PyTorch's random numbers usable.
    assert torch.rand(3, device=DEVICE).shape == (3,)
    assert_same((model, twin), *left_padded(LENGTHS), do_sample=True)


def test_experts_in_one_product_are_recorded():
    model, twin = make("qwen3_moe", experts_implementation="grouped_mm")
    assert_same((model, twin), *left_padded(LENGTHS))
    assert recorded(model) == 1


def test_weights_that_move_are_recorded_anew():
    model, twin = make()
    assert_same((model, twin), *left_padded(ALONE), steps=8)
    for each in (model, twin):
        each.float()
    assert_same((model, twin), *left_padded(ALONE), steps=8)
    for each in (model, twin):
        each.to("cpu").to(DEVICE)
    assert_same((model, twin), *left_padded(ALONE), steps=8)
    assert recorded(model) == 1


def test_other_threads_and_streams():
    model, twin = make()
    tokens, mask = left_padded(ALONE)
    expected = run(twin, tokens, mask)
    run(model, tokens, mask)
    found = []
    thread = threading.Thread(target=lambda: found.append(run(model, tokens, mask)))
    thread.start()
    thread.join()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found.append(run(model, tokens, mask))
    stream.synchronize()
    found.append(run(model, tokens, mask))
    assert all(torch.equal(logits, expected[1]) for _, logits, _ in found)


def test_fewer_kernels_are_launched():
    launches, activities = [], [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    for model in make():
        cache = dd.DeltaCache(model.config)
        tokens, _ = left_padded(ALONE)
        with torch.no_grad():
            model(tokens, past_key_values=cache, logits_to_keep=1)
            for _ in range(4):
                model(tokens[:, :1], past_key_values=cache)
            torch.cuda.synchronize()
            with profile(activities=activities, acc_events=True) as seen:
                model(tokens[:, :1], past_key_values=cache)
                torch.cuda.synchronize()
        names = [event.name.lower() for event in seen.events()]
        launches.append(sum("launch" in name for name in names))
    assert 0 < launches[0] < launches[1] / 2


def test_graphs_are_freed_with_their_model():
    def allocated():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    tokens, mask = left_padded(ALONE)
    model, twin = make()
    run(twin, tokens, mask)  # what PyTorch keeps
    del model, twin
    before = allocated()
    model, twin = make()
    run(model, tokens, mask)
    assert allocated()[0] > before[0]
    del model, twin
    # A workspace of cuBLAS for the stream of captures may stay.
    assert allocated()[0] <= before[0] + 80 * 2**20
