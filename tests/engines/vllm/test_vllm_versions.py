"""What differs between versions of vLLM."""

import pickle
from itertools import combinations
from types import SimpleNamespace

import numpy
import pytest
import torch
from vllm import SamplingParams
from vllm.config import SchedulerConfig
from vllm.utils.hashing import sha256
from vllm.v1.attention.backends import registry
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched import output
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker import ubatch_utils

import deltadecode_vllm
from deltadecode.config import DeltaConfig
from deltadecode.engines.serving import settings
from deltadecode.engines.vllm import backend, checks, interface, plugin, versions
from deltadecode.engines.vllm.versions import check_version, key_value_views
from deltadecode.errors import DeltaConfigError


@pytest.mark.parametrize("version", ["0.24.0", "0.32.0+cpu", "0.28.1rc2", "dev"])
def test_versions_in_range(version):
    assert check_version(version, cpu=True) is None


@pytest.mark.parametrize("version", ["0.23.9", "0.9.2"])
def test_older_versions_are_refused_with_the_range(version):
    words = f"deltadecode works with vLLM 0.24 to 0.32, got {version}"
    with pytest.raises(DeltaConfigError, match=f"^{words}$"):
        check_version(version, cpu=True)


@pytest.mark.parametrize("version", ["0.33.0", "1.0.0rc1"])
def test_a_newer_version_is_warned_of_and_refused_without_its_interface(version, monkeypatch):
    words = f"known to work with vLLM 0.24 to 0.32; {version} has the same interface, so it may"
    assert check_version(version, cpu=True) == words
    monkeypatch.setattr(ubatch_utils, "split_attn_metadata", lambda slices, common: None)
    monkeypatch.delattr(EngineCore, "preprocess_add_request")
    monkeypatch.delattr(output.CachedRequestData, "__annotations__")
    with pytest.raises(DeltaConfigError) as refused:
        check_version(version, cpu=True)
    assert str(refused.value) == (
        f"deltadecode works with vLLM 0.24 to 0.32, and {version} has no "
        "req_ids of vllm.v1.core.sched.output.CachedRequestData, "
        "no num_computed_tokens of vllm.v1.core.sched.output.CachedRequestData, "
        "no vllm.v1.engine.core.EngineCore.preprocess_add_request, "
        "no ubatch_slices of vllm.v1.worker.ubatch_utils.split_attn_metadata, "
        "no common_attn_metadata of vllm.v1.worker.ubatch_utils.split_attn_metadata"
    )


def test_the_installed_version_has_the_interface():
    """That of GPUs too, as far as it can be imported here."""
    assert interface.missing(cpu=True) == []
    assert interface.missing(cpu=False) == []


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


def block_hashes(plan_salt, user_salt):
    """Of a request of four blocks, as an engine's core makes them."""
    scheduler = SimpleNamespace()
    if plan_salt is not None:
        versions.salt_requests(scheduler, plan_salt)
    core = SimpleNamespace(
        scheduler=scheduler, mm_receiver_cache=None,
        request_block_hasher=kv_cache_utils.get_request_block_hasher(16, sha256),
    )  # fmt: skip
    request = EngineCoreRequest(
        request_id="0", prompt_token_ids=list(range(64)), mm_features=None,
        sampling_params=SamplingParams(max_tokens=1), pooling_params=None, arrival_time=0.0,
        lora_request=None, cache_salt=user_salt, data_parallel_rank=None,
    )  # fmt: skip
    made, _ = EngineCore.preprocess_add_request(core, request)
    assert len(made.block_hashes) == 4
    return made.block_hashes


def test_rule1_the_plan_and_the_user_s_salt_both_enter_every_block_hash():
    kv_cache_utils.init_none_hash(sha256)
    before = {user: block_hashes(None, user) for user in (None, "", "u")}
    plans, users = (None, "one", "other"), (None, "u", "v")
    found = {(plan, user): block_hashes(plan, user) for plan in plans for user in users}
    for some, others in combinations(found.values(), 2):
        assert not set(some) & set(others)
    assert all(found[plan, user] == block_hashes(plan, user) for plan, user in found)
    # An engine without a plan in the same process is as it was; an empty salt is none.
    assert (before[None], before["u"]) == (found[None, None], found[None, "u"])
    assert before[""] == before[None] and block_hashes("one", "") == found["one", None]


def test_the_entry_point_names_what_there_is():
    """It imports nothing of deltadecode, so it has names of its own."""
    assert deltadecode_vllm.KEY == settings.KEY
    module, _, name = deltadecode_vllm.BACKEND_CLASS.rpartition(".")
    assert module == backend.__name__ and hasattr(backend, name)


def test_an_unknown_vllm_stays_as_it_is(monkeypatch):
    monkeypatch.delattr(registry, "register_backend")
    said = []
    monkeypatch.setattr(deltadecode_vllm, "_warn", lambda *words: said.append(words))
    deltadecode_vllm.register()
    assert "cannot import name 'register_backend'" in str(said[0][1])


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


@pytest.mark.parametrize(
    ("cpu", "supports", "own", "ahead"),
    [(False, True, None, True), (True, True, None, False), (False, False, None, False),
     (False, True, "a.Scheduler", False)],
)  # fmt: skip
def test_scheduling_is_asynchronous_where_vllm_can(monkeypatch, cpu, supports, own, ahead):
    from vllm.platforms import current_platform
    from vllm.v1.executor.abstract import Executor

    executor = SimpleNamespace(supports_async_scheduling=lambda: supports)
    monkeypatch.setattr(Executor, "get_class", lambda config: executor)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: cpu)
    scheduler = SimpleNamespace(async_scheduling=False, scheduler_cls=own)
    config = SimpleNamespace(scheduler_config=scheduler)
    versions.schedule_ahead(config)
    assert scheduler.async_scheduling == ahead
    # vLLM would refuse it, and checks again in another process.
    seen = []
    again = deltadecode_vllm._stay_ahead(lambda one: seen.append(scheduler.async_scheduling))
    again(config)
    assert seen == [False] and scheduler.async_scheduling == ahead


def test_a_mark_goes_along_to_an_engine_s_own_process():
    config = SchedulerConfig(max_model_len=100, is_encoder_decoder=False)
    setattr(config, deltadecode_vllm.AHEAD, True)
    assert getattr(pickle.loads(pickle.dumps(config)), deltadecode_vllm.AHEAD)


@pytest.mark.parametrize(("asked", "ahead"), [(None, 1), (True, 1), (False, 0)])
def test_a_user_may_have_it_off(monkeypatch, asked, ahead):
    calls = []
    monkeypatch.setattr(versions, "check_backend", lambda config: None)
    monkeypatch.setattr(versions, "schedule_ahead", calls.append)
    monkeypatch.setattr(plugin, "_prepare", lambda config: True)
    config = SimpleNamespace(speculative_config=SimpleNamespace(model=deltadecode_vllm.PROPOSER))
    assert plugin.prepare_engine(config, None, asked)
    assert len(calls) == ahead
    calls.clear()
    assert plugin.prepare_engine(SimpleNamespace(), None, asked) and not calls


def test_an_engine_that_sleeps_does_not_draft():
    """CPUs have no such mode, so no engine's configuration can have it here."""
    cfg = DeltaConfig(8, 4, 1, 1, (), (0,))
    parallel = SimpleNamespace(data_parallel_size=1, pipeline_parallel_size=1)
    config = SimpleNamespace(
        model_config=SimpleNamespace(enable_sleep_mode=True, hf_config=None), lora_config=None,
        parallel_config=parallel, kv_transfer_config=None,
        speculative_config=SimpleNamespace(num_speculative_tokens=4),
    )  # fmt: skip
    given = settings.ServingSettings(cfg, cfg.layer_plan(2))
    with pytest.raises(DeltaConfigError, match="--enable-sleep-mode must be off in lossless mode"):
        checks.check_lossless(config, given)
    config.model_config.enable_sleep_mode = False
    checks.check_lossless(config, given)
