"""Caches of eight bits on a GPU: the kernels against float64, and both caches beside each other."""

import pytest
import torch
from gpu_cases import error, make_gpu_case, poison_allocator
from test_gpu_offload import assert_same
from test_gpu_transformers import CFG, SHARE, left_padded, make

import deltadecode as dd
from deltadecode import ops
from deltadecode.config import DeltaConfig
from deltadecode.engines.transformers.packing import Packing

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 2e-6}
RAGGED = [1, 15, 16, 17, 1023, 1024, 1025, 2500, 5000]
KINDS = ("int8", "fp8")


def packed(case, kind):
    """The caches of a case as they are packed: keywords for the kernels, and float64 states."""
    stored, exact = {}, []
    for name, cache in zip("kv", case.arguments[1:3], strict=True):
        # A block is a row of a batch of blocks.
        packing = Packing(kind)
        states = packing.pack(cache.transpose(1, 2))
        stored[f"{name}_cache"], stored[f"{name}_scales"] = packing.parts(states.transpose(1, 2))
        numbers, scales = stored[f"{name}_cache"], stored[f"{name}_scales"]
        exact.append(numbers.double() * scales[..., None].double())
    return stored, exact


@pytest.mark.parametrize(
    ("kind", "dtype", "kv_heads", "group", "dim", "tokens"),
    [
        ("int8", torch.bfloat16, 2, 6, 128, None),
        ("int8", torch.bfloat16, 8, 4, 128, None),
        ("int8", torch.bfloat16, 3, 3, 64, None),
        ("int8", torch.bfloat16, 2, 6, 128, 4),
        ("int8", torch.float16, 1, 4, 80, None),
        ("int8", torch.float32, 2, 6, 128, None),
        ("fp8", torch.bfloat16, 2, 6, 128, None),
    ],
)
def test_kernels(kind, dtype, kv_heads, group, dim, tokens):
    case = make_gpu_case(
        RAGGED, kv_heads=kv_heads, group=group, dim=dim, tokens=tokens, dtype=dtype, sinks=dim == 64
    )
    stored, exact = packed(case, kind)
    q, _, _, table, lens = case.arguments
    pages = {"block_table": table, "seq_lens": lens, **case.options}
    poison_allocator()
    out, scores = ops.decode_attention(
        q, **stored, **pages, return_page_scores=True, backend="triton"
    )
    expected, expected_scores = ops.decode_attention(
        q.double(), *exact, **pages, return_page_scores=True, backend="reference"
    )
    assert error(out, expected) < TOLERANCE[dtype]
    assert error(scores, expected_scores) < 5e-6
    cfg = DeltaConfig(page_size=16, budget_pages=20)
    ids, counts = ops.select_pages(scores, lens, cfg, backend="triton")
    selected = {"page_ids": ids, "page_counts": counts}
    poison_allocator()
    out = ops.decode_attention(q, **stored, **pages, **selected, backend="triton")
    expected = ops.decode_attention(q.double(), *exact, **pages, **selected, backend="reference")
    assert error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(("heads", "dim"), [(8, 128), (3, 64), (1, 80)])
def test_a_token_is_packed_as_a_prompt_is(heads, dim):
    states = torch.randn(2, 33, 1, heads, dim, device="cuda").bfloat16().transpose(2, 3)
    packing = Packing("int8")
    expected = [packing.pack(part) for part in states]
    assert all(
        torch.equal(*both) for both in zip(packing.pack_both(*states), expected, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cfg", [CFG, SHARE])
def test_both_caches_give_the_same_bits_and_nearly_what_the_model_gives(cfg, kind):
    model = make("llama", torch.bfloat16, cfg)
    tokens, mask = left_padded()
    pair = (
        dd.DeltaOffloadedCache(model.config, cfg, kv_dtype=kind),
        dd.DeltaCache(model.config, kv_dtype=kind),
    )
    found, _ = assert_same(model, pair, tokens, mask, 60)
    for cache in pair:
        cache.crop(-11)
    kept = found[:, : found.shape[1] - 10]
    more = torch.ones(3, kept.shape[1] - mask.shape[1], dtype=torch.long, device="cuda")
    assert_same(model, pair, kept, torch.cat([mask, more], dim=1), 20)

    plain = dd.DeltaCache(model.config)
    steps = []
    with torch.no_grad():
        for cache in (plain, dd.DeltaCache(model.config, kv_dtype=kind)):
            model(tokens[:1], past_key_values=cache, logits_to_keep=1)
            logits = [model(tokens[:1, :1], past_key_values=cache).logits for _ in range(3)]
            steps.append(torch.cat(logits).float().log_softmax(-1))
    assert (steps[0].exp() * (steps[0] - steps[1])).sum(-1).max() < (
        0.05 if kind == "int8" else 0.5
    )
    assert not torch.equal(*steps)


def test_a_cache_takes_half_the_bytes_and_packing_little_besides():
    model = make("llama", torch.bfloat16)
    half, eight = (dd.DeltaCache(model.config, kv_dtype=kind) for kind in (None, "int8"))
    states = torch.randn(2, 1, 2, 200_000, 64, device="cuda", dtype=torch.bfloat16)
    for cache in (half, eight):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for layer in range(6):
            cache.update(*states, layer)
        peak = torch.cuda.max_memory_allocated() - before
        assert peak < cache.device_bytes + 2**29
    # 2 heads of 64: 132 bytes, up to 144, instead of 256.
    assert half.device_bytes / eight.device_bytes == pytest.approx(256 / 144, rel=0.01)
