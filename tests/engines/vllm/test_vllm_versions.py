"""What differs between versions of vLLM."""

from types import SimpleNamespace

import numpy
import pytest
import torch

import deltadecode_vllm
from deltadecode.engines.serving import settings
from deltadecode.engines.vllm import backend, versions
from deltadecode.engines.vllm.versions import key_value_views, outside_range


@pytest.mark.parametrize("version", ["0.24.0", "0.32.0+cpu", "0.28.1rc2", "dev"])
def test_versions_in_range(version):
    assert outside_range(version) is None


@pytest.mark.parametrize("version", ["0.23.9", "0.33.0", "1.0.0", "0.9.2"])
def test_versions_out_of_range_are_named_with_the_range(version):
    assert outside_range(version) == f"deltadecode works with vLLM 0.24 to 0.32, got {version}"


def test_both_cache_layouts_give_the_same_views():
    blocks, size, heads, dim = 3, 16, 2, 8
    k, v = torch.randn(2, blocks, size, heads, dim).unbind(0)
    of_024 = torch.stack((k, v), dim=1)
    of_032 = torch.cat((k, v), dim=-1).transpose(1, 2).contiguous()
    for cache in (of_024, of_032):
        k_cache, v_cache = key_value_views(cache, dim)
        assert torch.equal(k_cache, k) and torch.equal(v_cache, v)
        assert k_cache.stride(3) == v_cache.stride(3) == 1
        k_cache[0, 0, 0, 0] = 7.0  # a view, not a copy
        assert (cache == 7.0).any()


def test_a_model_state_passes_on_which_rows_belong_to_prompts():
    class State:
        def prepare_attn(self, input_batch, mode, tables, slots, attn_groups, config, **more):
            return self, mode, [dict(vars(builder)) for builder in builders], more

    builders = [SimpleNamespace(prefilling=None), SimpleNamespace()]
    groups = [
        [SimpleNamespace(get_metadata_builder=lambda _, builder=builder: builder)]
        for builder in builders
    ]
    versions.pass_on_prompts(State)
    versions.pass_on_prompts(State)
    batch = SimpleNamespace(is_prefilling_np=numpy.array([True]))
    state = State()
    by_name = state.prepare_attn(batch, "full", (), None, attn_groups=groups, config=None, more=1)
    in_order = state.prepare_attn(batch, "full", (), None, groups, None, more=1)
    for found in (by_name, in_order):
        assert found[:2] == (state, "full") and found[3] == {"more": 1}
        assert found[2][0]["prefilling"].tolist() == [True] and found[2][1] == {}


def test_the_entry_point_names_what_there_is():
    """It imports nothing of deltadecode, so it has names of its own."""
    assert deltadecode_vllm.KEY == settings.KEY
    module, _, name = deltadecode_vllm.BACKEND_CLASS.rpartition(".")
    assert module == backend.__name__ and hasattr(backend, name)


def test_a_function_is_wrapped_once_and_keeps_its_kind():
    class Owner:
        def plain(self, x):
            return x

        @classmethod
        def bound(cls, x):
            return x

    for name in ("plain", "bound"):
        for _ in range(2):
            deltadecode_vllm.wrap_once(Owner, name, lambda f: lambda *args: f(*args) + 1)
    assert Owner().plain(1) == 2
    assert Owner.bound(1) == Owner().bound(1) == 2
