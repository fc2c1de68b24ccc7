"""What an offloaded cache refuses, in one line and before anything has run."""

import pytest
import torch
from hf_shrink import tiny_model
from hf_tiny import make_model, make_prompt, small_config
from transformers.cache_utils import DynamicLayer

import deltadecode as dd
from deltadecode.engines.transformers import offload_room
from deltadecode.engines.transformers.offload_host import CudaTransfer, Transfer

LINE = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture
def model():
    model = make_model("llama", "sdpa")
    dd.enable(model, small_config())
    return model


@pytest.fixture
def simulated(model):
    return dd.DeltaOffloadedCache(model.config, small_config(), transfer=Transfer())


def refuses(model, match, **options):
    with pytest.raises(dd.UnsupportedCacheError, match=match) as caught:
        model.generate(make_prompt(41, rows=2), **{**LINE, **options})
    assert "\n" not in str(caught.value)
    assert dd.stats(model).steps == 0


def test_a_model_on_the_cpu(model) -> None:
    refuses(model, "needs a CUDA device, got cpu", cache_implementation="offloaded")
    cache = dd.DeltaOffloadedCache(model.config, small_config())
    refuses(model, "needs a CUDA device, got cpu", past_key_values=cache)
    assert cache.get_seq_length() == 0
    with pytest.raises(dd.UnsupportedCacheError, match="needs a CUDA device"):
        cache.update(*(torch.zeros(1, 2, 3, 8) for _ in range(2)), 2)


def test_lossless_mode(model, simulated) -> None:
    dd.enable(model, small_config(), lossless=True)
    refuses(model, "lossless decoding reads every layer", cache_implementation="offloaded")
    refuses(model, "lossless decoding reads every layer", past_key_values=simulated)


def test_another_plan(model, simulated) -> None:
    dd.enable(model, small_config(budget_pages=7))
    refuses(model, "the plan of its model, with budget_pages=7, got 5", past_key_values=simulated)


def test_other_implementations_stay_refused(model) -> None:
    for name in ("offloaded_static", "quantized"):
        refuses(model, "DeltaOffloadedCache, got", cache_implementation=name)


def test_not_enough_host_memory(model, simulated, monkeypatch) -> None:
    of_slot = 2 * 2 * 2 * 8 * 4  # keys and values of two rows
    needed = 3 * (41 + 1024) * of_slot
    monkeypatch.setattr(offload_room, "free_host_bytes", lambda: needed - 1)
    match = f"need {needed:,} more bytes of host memory for 43 tokens, got {needed - 1:,} free"
    refuses(model, match, past_key_values=simulated)
    assert all(layer.get_seq_length() == 0 for layer in simulated.layers)
    monkeypatch.setattr(offload_room, "free_host_bytes", lambda: needed)
    model.generate(make_prompt(41, rows=2), past_key_values=simulated, **LINE)
    monkeypatch.setattr(offload_room, "free_host_bytes", lambda: 0)
    model.generate(make_prompt(50, rows=2), past_key_values=simulated, **LINE)
    monkeypatch.setattr(CudaTransfer, "check", lambda self, device: None)
    # With the tokens that are asked for.
    dd.stats(model).reset()
    refuses(model, "more bytes of host memory for 43 tokens", cache_implementation="offloaded")


def test_layers_that_cannot_be_offloaded(model) -> None:
    config = model.config
    config.num_kv_shared_layers = 2
    with pytest.raises(dd.UnsupportedCacheError, match="num_kv_shared_layers=2"):
        dd.DeltaOffloadedCache(config, small_config())


def test_a_sparse_layer_that_keeps_more_than_keys_and_values(model, monkeypatch) -> None:
    class LongerLayer(DynamicLayer):
        """Beside keys and values it has those of an index."""

    made = dd.DeltaCache.__init__

    def make(self, config, **options):
        made(self, config, **options)
        self.layers[2] = LongerLayer()

    monkeypatch.setattr(dd.DeltaCache, "__init__", make)
    refuses(
        model, "sparse layer 2 cannot be offloaded: it keeps a LongerLayer, more than keys",
        cache_implementation="offloaded",
    )  # fmt: skip


def test_a_plan_of_another_type(model) -> None:
    with pytest.raises(dd.ArgumentError, match="cfg must be a DeltaConfig, got dict"):
        dd.DeltaOffloadedCache(model.config, {"page_size": 8})


def test_a_model_that_changes_its_keys_behind_the_cache() -> None:
    model = tiny_model("jetmoe").float()
    cfg = small_config(dense_layers=(), delta_layers=(0,))
    dd.enable(model, cfg)
    cache = dd.DeltaOffloadedCache(model.config, cfg, transfer=Transfer())
    refuses(model, "changes its keys behind the cache, got .* of 2 KV", past_key_values=cache)


def test_keys_that_are_not_those_of_a_decode_step(simulated) -> None:
    simulated.update(*(torch.randn(2, 2, 30, 8) for _ in range(2)), 2)
    simulated.begin(paging=True)
    keys, _ = simulated.update(*(torch.randn(2, 2, 1, 8) for _ in range(2)), 2)
    assert keys.shape == (2, 2, 31, 8)
    assert keys.isnan().all()
    simulated.layers[2].check_states(torch.nn.Identity(), keys)
    with pytest.raises(dd.UnsupportedCacheError, match="Identity changes its keys"):
        simulated.layers[2].check_states(torch.nn.Identity(), keys.clone())


def test_gradients_other_rows_and_another_dtype(simulated) -> None:
    states = [torch.randn(2, 2, 30, 8) for _ in range(2)]
    with pytest.raises(dd.UnsupportedCacheError, match="no gradients"):
        simulated.update(*(x.clone().requires_grad_() for x in states), 2)
    simulated.update(*states, 2)
    with pytest.raises(dd.UnsupportedCacheError, match="has 2 rows, got 1"):
        simulated.update(*(x[:1] for x in states), 2)
    with pytest.raises(dd.UnsupportedCacheError, match="one dtype"):
        simulated.update(*(x.double() for x in states), 2)
    assert simulated.layers[2].get_seq_length() == 30
