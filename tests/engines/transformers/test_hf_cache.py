"""The cache appends in place, and otherwise behaves as the stock one."""

import copy

import pytest
import torch
from hf_tiny import FAMILIES, make_model
from transformers import DynamicCache, LlamaConfig, MistralConfig, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from deltadecode import DeltaCache, UnsupportedModelError
from deltadecode.engines.transformers import layers
from deltadecode.engines.transformers.layers import DeltaLayer


def states(tokens: int, rows: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, rows, 3, tokens, 8, generator=generator))  # type: ignore[return-value]


def filled(*pieces: int, rows: int = 2) -> tuple[DeltaLayer, DynamicLayer]:
    ours, stock = DeltaLayer(), DynamicLayer()
    for seed, tokens in enumerate(pieces):
        for layer in (ours, stock):
            layer.update(*states(tokens, rows, seed))
    return ours, stock


def assert_same(ours: DeltaLayer, stock: DynamicLayer) -> None:
    assert ours.get_seq_length() == stock.get_seq_length()
    assert ours.get_mask_sizes(3) == stock.get_mask_sizes(3)
    assert torch.equal(ours.keys, stock.keys)
    assert torch.equal(ours.values, stock.values)


@pytest.mark.parametrize("pieces", [(1,), (5, 1, 1), (300, 1, 7), (1, 600, 1)])
def test_update_gives_what_the_stock_layer_gives(pieces: tuple[int, ...]) -> None:
    assert_same(*filled(*pieces))


@pytest.mark.parametrize("pieces", [(1,), (5, 1, 1), (300, 1, 7), (126, 1, 1, 1, 1)])
def test_a_short_cache_is_concatenated_and_then_appended_to(
    pieces: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_SHORT", 128)
    ours, stock = filled(*pieces)
    assert_same(ours, stock)
    room = ours._key_buffer.shape[2] > ours.keys.shape[2]
    assert room == (sum(pieces) > 128)
    for layer in (ours, stock):
        layer.reorder_cache(torch.tensor([1, 0]))
        layer.crop(-1)
        layer.update(*states(2, seed=8))
    assert_same(ours, stock)


def test_update_appends_in_place_and_grows_rarely_and_little() -> None:
    layer, _ = filled(700)
    places, moves, most = layer.keys.data_ptr(), 0, 0
    for step in range(1200):
        keys, values = layer.update(*states(1, seed=step))
        assert keys.data_ptr() == layer._key_buffer.data_ptr()
        assert values.data_ptr() == layer._value_buffer.data_ptr()
        moves += keys.data_ptr() != places
        places = keys.data_ptr()
        most = max(most, layer._key_buffer.shape[2] - keys.shape[2])
    assert 1 <= moves <= 1200 // 128 + 1
    assert most <= 128 + 64 + 64  # growth, rounding, and the room behind the last page


def test_a_prompt_gets_a_buffer_of_its_size() -> None:
    layer, _ = filled(700, 300)
    assert layer._key_buffer.shape[2] <= 1000 + 64 + 64


def test_a_partial_last_page_of_up_to_64_tokens_lies_inside_the_buffer() -> None:
    layer, _ = filled(1)
    for step in range(600):
        keys, _ = layer.update(*states(1, seed=step))
        assert layer._key_buffer.shape[2] - keys.shape[2] >= 63


def test_crop_reset_and_updates_after_them() -> None:
    ours, stock = filled(20, 1)
    for layer in (ours, stock):
        layer.crop(-6)
    assert_same(ours, stock)
    for layer in (ours, stock):
        layer.update(*states(3, seed=9))
    assert_same(ours, stock)
    with pytest.raises(ValueError, match="positive"):
        ours.crop(4)
    ours.reset()
    assert ours.get_seq_length() == 0
    assert not hasattr(ours, "_key_buffer")
    ours.update(*states(4, rows=1))
    assert ours.keys.shape == (1, 3, 4, 8)


@pytest.mark.parametrize("order", [[1, 0], [1, 1], [0, 1, 1, 0]])
def test_reorder_cache(order: list[int]) -> None:
    ours, stock = filled(20, 1)
    before = ours._key_buffer.data_ptr()
    for layer in (ours, stock):
        layer.reorder_cache(torch.tensor(order))
    assert_same(ours, stock)
    assert (ours._key_buffer.data_ptr() == before) == (len(order) == 2)
    for layer in (ours, stock):
        layer.update(*states(1, rows=len(order), seed=5))
    assert_same(ours, stock)


def test_rows_repeated_and_selected() -> None:
    ours, stock = filled(20, 1)
    for layer in (ours, stock):
        layer.batch_repeat_interleave(3)
        layer.batch_select_indices(torch.tensor([5, 0, 2]))
        layer.update(*states(1, rows=3, seed=5))
    assert_same(ours, stock)


def test_a_copy_is_independent_and_appends_in_place() -> None:
    ours, stock = filled(20, 1)
    twin = copy.deepcopy(ours)
    twin.update(*states(1, seed=7))
    assert_same(ours, stock)
    keys, _ = twin.update(*states(1, seed=8))
    assert keys.data_ptr() == twin._key_buffer.data_ptr() != ours._key_buffer.data_ptr()
    assert twin.get_seq_length() == 23


def test_a_wrong_number_of_rows_is_refused_not_broadcast() -> None:
    ours, _ = filled(4)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        ours.update(*states(1, rows=1))


def test_another_dtype_is_promoted_as_by_the_stock_layer() -> None:
    ours, stock = filled(4)
    for layer in (ours, stock):
        layer.update(*(x.double() for x in states(1)))
    assert ours.keys.dtype == torch.float64
    assert_same(ours, stock)
    ours.update(*(x.double() for x in states(1)))
    assert ours.keys.data_ptr() == ours._key_buffer.data_ptr()


def test_gradients_flow_through_the_cache_also_after_later_updates() -> None:
    ours, _ = filled(4, 1)
    keys, values = (x.requires_grad_() for x in states(2))
    first = ours.update(keys, values)[0].square().sum()
    later = ours.update(*(x.requires_grad_() for x in states(1)))[0].square().sum()
    (first + later).backward()
    assert torch.equal(keys.grad, 4 * keys)


def test_filled_in_inference_mode_and_continued_outside() -> None:
    ours, stock = DeltaLayer(), DynamicLayer()
    with torch.inference_mode():
        for layer in (ours, stock):
            layer.update(*states(4))
    for layer in (ours, stock):
        layer.update(*states(1, seed=3))
        layer.reorder_cache(torch.tensor([1, 0]))
    assert_same(ours, stock)


def test_early_initialization() -> None:
    cache = DeltaCache(make_model("llama", "sdpa").config)
    cache.early_initialization(2, 3, 8, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert cache.get_seq_length() == 0
    assert cache.update(*states(4), 0)[0].shape == (2, 3, 4, 8)


def test_the_cache_is_a_dynamic_cache_with_layers_of_our_own() -> None:
    cache = DeltaCache(make_model("llama", "sdpa").config)
    assert isinstance(cache, DynamicCache)
    assert [type(layer) for layer in cache.layers] == [DeltaLayer] * 6
    assert not cache.is_compileable
    assert [keys for keys, _, _ in cache] == [None] * 6
    gemma = DeltaCache(make_model("gemma3", "sdpa").config)
    kinds = [DynamicSlidingWindowLayer, DeltaLayer, DeltaLayer]
    assert [type(layer) for layer in gemma.layers] == kinds * 2


def test_a_window_as_long_as_the_longest_sequence_is_full_attention() -> None:
    kind, values = MistralConfig, FAMILIES["mistral"][1]
    values = {**values, "num_hidden_layers": 2, "max_position_embeddings": 64}
    cache = DeltaCache(kind(**{**values, "sliding_window": 64}))
    assert [type(layer) for layer in cache.layers] == [DeltaLayer] * 2
    with pytest.raises(UnsupportedModelError, match="MistralConfig"):
        DeltaCache(kind(**{**values, "sliding_window": 63}))


def test_works_on_a_device_without_data() -> None:
    layer = DeltaLayer()
    keys, _ = layer.update(*(x.to("meta") for x in states(5)))
    keys, _ = layer.update(*(x.to("meta") for x in states(1)))
    assert keys.shape == (2, 3, 6, 8)
    assert keys.device.type == "meta"


def test_needs_a_configuration() -> None:
    with pytest.raises(UnsupportedModelError, match="PreTrainedConfig"):
        DeltaCache(PreTrainedConfig())
    assert len(DeltaCache(LlamaConfig(num_hidden_layers=3)).layers) == 3
