"""Settings, counts and versions of the vLLM plugin: all that needs no vLLM."""

import pytest
import torch

from deltadecode import DeltaConfig, DeltaConfigError, UnsupportedModelError
from deltadecode.engines.vllm import Settings, attended_tokens, resolve
from deltadecode.engines.vllm.settings import own_settings
from deltadecode.engines.vllm.versions import key_value_views, outside_range


class Model:
    """The configuration of a model that has no profile."""

    model_type, hidden_size, num_hidden_layers = "llama", 64, 12
    num_attention_heads, num_key_value_heads = 4, 2
    max_position_embeddings = 4096

    def __init__(self, **more):
        self.__dict__.update(more)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pages": 3}, "unknown key 'pages' in additional_config.deltadecode"),
        ("64", "must be an object, got '64'"),
        ({"sync_heads": "yes"}, "sync_heads must be true or false, got 'yes'"),
        ({"on_unsupported": "full"}, "on_unsupported must be 'error' or 'stock', got 'full'"),
        ({"plan": 3}, "plan must be the path of a JSON file, got 3"),
    ],
)
def test_rule9_settings_are_refused_in_one_line(given, words):
    with pytest.raises(DeltaConfigError, match=words.replace("(", r"\(")):
        own_settings(given)


def test_rule9_a_wrong_type_comes_before_a_model_that_has_no_plan():
    windowed = Model(sliding_window=16)
    with pytest.raises(DeltaConfigError, match="budget_pages must be an int, got '64'"):
        resolve({"budget_pages": "64"}, windowed)
    with pytest.raises(UnsupportedModelError):
        resolve({"budget_pages": 64}, windowed)


def test_without_settings_it_is_the_plan_of_the_model():
    settings = resolve(None, Model())
    assert settings.config == DeltaConfig.for_model(Model())
    assert (settings.sync_heads, settings.on_unsupported) == (False, "error")


def test_settings_replace_fields_of_the_model_s_plan():
    settings = resolve({"budget_pages": 32, "sync_heads": True}, Model())
    assert settings.config.budget_pages == 32
    assert settings.config.delta_layers == DeltaConfig.for_model(Model()).delta_layers
    assert settings.sync_heads


def test_settings_replace_fields_of_a_file(tmp_path):
    path = tmp_path / "plan.json"
    DeltaConfig(budget_pages=20, dense_layers=(0,), delta_layers=(1, 5)).save(path)
    settings = resolve({"plan": str(path), "recent_pages": 2}, Model())
    assert settings.config == DeltaConfig(16, 20, 2, 0, (0,), (1, 5))


def test_resolved_settings_resolve_to_themselves():
    """Workers on other machines read them, where the file of the plan need not exist."""
    settings = resolve({"budget_pages": 32, "sync_heads": True}, Model())
    assert resolve(settings.as_dict(), Model()) == settings


@pytest.mark.parametrize("tokens", [1, 16, 17, 95, 96, 97, 111, 112, 113, 1000])
def test_attended_tokens_equal_a_count_of_the_selected_pages(tokens):
    config = DeltaConfig(16, 6, 2, 1, (0,), (1, 3))
    settings = Settings(config, config.layer_plan(7, (0, 1, 3, 4, 6)))
    pages = [range(first, min(first + 16, tokens)) for first in range(0, tokens, 16)]
    chosen = pages if len(pages) <= 6 else [pages[0], *pages[-5:]]  # any six with the last
    sparse = sum(map(len, chosen))
    assert attended_tokens(settings, tokens) == (3 * tokens + 2 * sparse, 5 * tokens)


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
