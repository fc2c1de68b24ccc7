"""A cache of eight bits gives what its numbers give where they are written back in full."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hf_shrink import tiny_model
from hf_tiny import FAMILIES, generate, make_model, make_prompt, small_config, stock_name

import deltadecode as dd
from deltadecode.engines.transformers import offload
from deltadecode.engines.transformers.layers import DeltaLayer
from deltadecode.engines.transformers.offload_host import Transfer
from deltadecode.engines.transformers.offload_size import cache_bytes
from deltadecode.engines.transformers.packing import Packing, packed_bytes

KINDS = ["int8", "fp8"]
SHARE = {"budget_share": 0.4}
NO_RECENT = {"recent_pages": 0}


class RoundedLayer(DeltaLayer):
    """The reference: rounds what it stores, and gives all of it in the model's type.

    New tokens of a prompt attend to each other as they are.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        given = key_states, value_states
        rounded = []
        for states in given:
            packing = Packing(self.kind)
            rounded.append(packing.unpack(packing.pack(states)))
        keys, values = super().update(*rounded)
        added = given[0].shape[2]
        if added == 1 and keys.shape[2] > 1:
            return keys, values
        stored = keys.clone(), values.clone()
        for whole, new in zip(stored, given, strict=True):
            whole[:, :, -added:] = new
        return stored


def rounded_cache(config: Any, kind: str) -> dd.DeltaCache:
    cache = dd.DeltaCache(config)
    for place, layer in enumerate(cache.layers):
        if isinstance(layer, DeltaLayer):
            cache.layers[place] = RoundedLayer(kind)
    return cache


def enabled(family: str = "llama", **changes: Any) -> Any:
    # In float64, so that no noise of sums makes a number another one.
    model = make_model(family, stock_name(family)).double()
    dd.enable(model, small_config(family, **changes))
    return model


def three(model: Any, kind: str = "int8", **changes: Any) -> list[Any]:
    """Caches that must give the same: the reference, on the device, and on the host."""
    cfg = small_config(model.config.model_type.removesuffix("_text"), **changes)
    return [
        rounded_cache(model.config, kind),
        dd.DeltaCache(model.config, kv_dtype=kind),
        dd.DeltaOffloadedCache(model.config, cfg, transfer=Transfer(), kv_dtype=kind),
    ]


def run(model: Any, prompt: Any, cache: Any, steps: int = 24, **options: Any) -> Any:
    dd.stats(model).reset()
    out = generate(model, prompt, steps, past_key_values=cache, **options)
    return out.sequences, torch.stack(out.logits), dd.stats(model).per_layer


def assert_alike(model: Any, caches: list[Any], prompt: Any, *args: Any, **options: Any) -> Any:
    """All caches give the same, the last two the same bits; gives the tokens."""
    expected, ours, host = (run(model, prompt, cache, *args, **options) for cache in caches)
    for found in (ours, host):
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-6)
        assert found[2] == expected[2]
    assert torch.equal(ours[1], host[1])
    for left, right in zip(caches[1].layers, caches[2].layers, strict=True):
        assert torch.equal(left.keys, right.keys)
        assert left.get_seq_length() == right.get_seq_length()
    return expected[0]


def padded(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(lengths)
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
    return make_prompt(longest, len(lengths)) * mask, mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_number_is_the_nearest_of_its_token(kind: str, dtype: torch.dtype) -> None:
    states = (
        torch.randn(2, 3, 5, 8, dtype=torch.float64) * torch.logspace(-30, 30, 5)[:, None]
    ).to(dtype)
    states[1, 2, 3] = 0
    packing = Packing(kind)
    packed = packing.pack(states)
    assert packed.shape == (2, 1, 5, packed_bytes(3, 8)) == (2, 1, 5, 32)
    found = packing.unpack(packed)
    assert found.dtype == dtype
    most = states.abs().amax(dim=3, keepdim=True)
    step = most / 254 if kind == "int8" else torch.maximum(states.abs() / 16, most / 448 / 512)
    # A half step, the scale's own rounding, and that of the model's type.
    slack = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    assert ((found - states).abs() <= step * 1.01 + slack * states.abs()).all()
    assert not torch.equal(found, states)
    assert torch.equal(found[1, 2, 3], states[1, 2, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim"), [(3, 8), (2, 20), (1, 64)])
def test_the_kernel_packs_a_token_as_pytorch_does(heads: int, dim: int, dtype: torch.dtype) -> None:
    kernel = pytest.importorskip("deltadecode.engines.transformers.packing_kernel")
    # As models make them: a view of all tokens by heads.
    states = torch.randn(2, 40, 1, heads, dim).to(dtype).transpose(2, 3)
    states *= torch.logspace(-20, 20, 40)[:, None, None, None].to(dtype)
    states[0, 3, 0] = 0
    expected = torch.stack([Packing("int8").pack(part) for part in states])
    found = kernel.pack_token(*states, packed_bytes(heads, dim), 2 * -(-heads * dim // 2))
    assert torch.equal(found, expected)
    states[1, 5, 0, 0, 2] = float("nan")
    found = kernel.pack_token(*states, packed_bytes(heads, dim), 2 * -(-heads * dim // 2))
    packing = Packing("int8")
    packing.pack(states[1])
    _, scales = packing.parts(found[1].transpose(1, 2))
    assert scales[5, 0, 0].isnan()


def test_pieces_of_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    states = torch.randn(2, 3, 50, 8)
    whole = Packing("int8").pack(states)
    monkeypatch.setattr("deltadecode.engines.transformers.packing._AT_ONCE", 7 * 2 * 3 * 8)
    packing = Packing("int8")
    packed = packing.pack(states)
    assert torch.equal(packed, whole)
    assert torch.equal(packing.unpack(packed)[:, :, :7], packing.unpack(packed[:, :, :7]))


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model = enabled(family)
    assert_alike(model, three(model), make_prompt(41))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("fp8", {}),
        ("int8", SHARE),
        ("int8", NO_RECENT),
        ("int8", {"page_size": 1, "budget_pages": 11}),
    ],
)
def test_padded_batches_some_rows_within_the_budget(kind: str, changes: dict[str, Any]) -> None:
    model = enabled(**changes)
    tokens, mask = padded((41, 9, 26, 41, 9, 3))
    assert_alike(model, three(model, kind, **changes), tokens, attention_mask=mask)


@pytest.mark.parametrize("tokens", [1, 19, 20])
def test_a_short_prompt_grows_beyond_the_budget(tokens: int) -> None:
    model = enabled()
    assert_alike(model, three(model), make_prompt(tokens, rows=2), 33)


def test_a_padded_conversation_that_goes_on_has_gaps() -> None:
    model = enabled()
    caches = three(model)
    tokens, mask = padded((31, 12, 22))
    first = assert_alike(model, caches, tokens, 10, attention_mask=mask)
    more, more_mask = padded((9, 4, 7))
    mask = torch.cat([mask, torch.ones(3, 10, dtype=torch.long), more_mask], dim=1)
    assert_alike(model, caches, torch.cat([first, more], dim=1), attention_mask=mask)


@pytest.mark.parametrize("removed", [1, 11, 51])
def test_cropped_copied_and_continued(removed: int) -> None:
    model = enabled()
    caches = three(model)
    tokens = assert_alike(model, caches, make_prompt(41, rows=2), 31)
    for cache in caches:
        cache.crop(-removed)
    twins = [copy.deepcopy(caches[0]), *(pickle.loads(pickle.dumps(c)) for c in caches[1:])]
    kept = tokens[:, : tokens.shape[1] - 1 - removed]
    tokens = torch.cat([kept, make_prompt(2, rows=2, seed=5)], dim=1)
    assert torch.equal(*(assert_alike(model, each, tokens) for each in (caches, twins)))


def test_chunked_prefill() -> None:
    model = enabled()
    for size in (7, 39):
        assert_alike(model, three(model), make_prompt(41, rows=2), 12, prefill_chunk_size=size)


def test_beam_search_and_rows_that_are_chosen() -> None:
    model = enabled()
    caches = three(model)
    options = {"num_beams": 3, "num_return_sequences": 2}
    found = [run(model, make_prompt(41, rows=2), cache, 12, **options)[0] for cache in caches]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    for cache in caches:
        cache.batch_select_indices(torch.tensor([4, 0]))
        cache.batch_repeat_interleave(2)
    assert torch.equal(caches[1].layers[3].keys, caches[2].layers[3].keys)
    assert caches[1].layers[3].keys.shape[0] == 4


def test_steps_with_dropout_and_a_disabled_model_read_everything() -> None:
    model = enabled()
    caches = three(model)
    tokens = assert_alike(model, caches, make_prompt(41), 12)
    dd.disable(model)
    out = [model.generate(tokens, past_key_values=cache, max_new_tokens=5) for cache in caches]
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


def test_keys_and_values_are_stored_in_eight_bits() -> None:
    model = make_model("llama", "sdpa", num_key_value_heads=4, head_dim=128)
    caches = dd.DeltaCache(model.config, kv_dtype="int8"), dd.DeltaCache(model.config)
    states = torch.randn(2, 1, 4, 5000, 128).bfloat16()
    for cache in caches:
        cache.update(*states, 0)
        keys, _ = cache.update(*states[:, :, :, :9], 0)
        assert keys.dtype == torch.bfloat16
    assert packed_bytes(4, 128) == 4 * 128 + 4 * 2 + 8
    assert packed_bytes(8, 128) == 8 * 130
    ratio = caches[1].device_bytes / caches[0].device_bytes
    assert ratio == pytest.approx(1024 / 528, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_what_generate_makes_by_itself(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "CudaTransfer", Transfer)
    model, cfg = enabled(), small_config()
    expected = generate(model, make_prompt(41), 20)
    dd.enable(model, cfg, kv_dtype=kind)
    found = [
        generate(model, make_prompt(41), 20, cache_implementation=name)
        for name in (None, "offloaded")
    ]
    caches = [each.past_key_values for each in found]
    assert [cache.kv_dtype for cache in caches] == [kind, kind]
    assert isinstance(caches[1], dd.DeltaOffloadedCache)
    logits, host, plain = (torch.stack(each.logits) for each in (*found, expected))
    assert torch.equal(logits, host)
    assert not torch.equal(logits, plain)
    twin = copy.deepcopy(model)
    assert torch.equal(torch.stack(generate(twin, make_prompt(41), 20).logits), logits)
    dd.enable(model, cfg)
    assert torch.equal(torch.stack(generate(model, make_prompt(41), 20).logits), plain)


def test_forward_makes_one_unless_gradients_are_needed() -> None:
    model = enabled()
    dd.enable(model, small_config(), kv_dtype="int8")
    out = model(make_prompt(9))
    assert out.past_key_values.kv_dtype is None
    out.logits.sum().backward()
    with torch.no_grad():
        assert model(make_prompt(9)).past_key_values.kv_dtype == "int8"


def test_refusals() -> None:
    model, cfg = enabled(), small_config()
    cache = dd.DeltaCache(model.config, kv_dtype="int8")
    states = torch.randn(2, 1, 2, 5, 8, requires_grad=True)
    with pytest.raises(dd.UnsupportedCacheError, match="an eight-bit cache holds no gradients"):
        cache.update(*states, 0)
    for make in (dd.DeltaCache, dd.DeltaOffloadedCache):
        with pytest.raises(dd.ArgumentError, match="'int8', 'fp8' or None, got 'int4'"):
            make(model.config, kv_dtype="int4")
    with pytest.raises(dd.ArgumentError, match="or None, got 'int4'"):
        dd.enable(model, cfg, kv_dtype="int4")
    with pytest.raises(dd.ArgumentError, match="got kv_dtype='int8', which rounds"):
        dd.enable(model, cfg, kv_dtype="int8", lossless=True)
    dd.enable(model, cfg, kv_dtype="int8")
    with pytest.raises(dd.UnsupportedCacheError, match=r"static .* type, got kv_dtype='int8'"):
        generate(model, make_prompt(41), 3, cache_implementation="static")
    dd.enable(model, cfg, lossless=True)
    with pytest.raises(dd.UnsupportedCacheError, match="got a cache of int8, which rounds"):
        generate(model, make_prompt(41), 3, past_key_values=cache)
    model.config.num_kv_shared_layers = 2
    with pytest.raises(dd.UnsupportedCacheError, match="stored in eight bits, got num_kv_shared"):
        dd.enable(model, cfg, kv_dtype="int8")


def test_a_model_that_changes_its_keys_behind_the_cache() -> None:
    model = tiny_model("jetmoe").float()
    dd.enable(model, small_config(dense_layers=(), delta_layers=(0,)), kv_dtype="int8")
    with pytest.raises(dd.UnsupportedCacheError, match=r"of 2 KV heads, .* an eight-bit cache"):
        generate(model, make_prompt(41), 3)


def test_bytes_that_a_context_needs() -> None:
    model = enabled()
    cfg, config = small_config(), model.config
    plan = cfg.layer_plan(6)
    half, eight = (cache_bytes(config, cfg, plan, 1000, kind) for kind in (None, "int8"))
    of_token = 2 * 2 * 8 * 2
    assert half.device == 6 * 1000 * of_token
    for name in ("device", "offloaded_device", "offloaded_host"):
        assert getattr(eight, name) * of_token == getattr(half, name) * 2 * 32
