"""Everything that differs between vLLM 0.24 and 0.32."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from deltadecode.engines.serving.drafting import draft_choices
from deltadecode.engines.serving.settings import KEY, ServingSettings, resolve
from deltadecode.engines.vllm import BACKEND, interface
from deltadecode.errors import DeltaConfigError
from deltadecode_vllm import AHEAD, PROPOSER, is_chosen, is_lossless, wrap_once

FIRST, LAST = (0, 24), (0, 32)
SUPPORTED = f"{FIRST[0]}.{FIRST[1]} to {LAST[0]}.{LAST[1]}"
_SALT = "deltadecode_salt"


def check_version(version: str, cpu: bool) -> str | None:
    """What to warn of, with a version of vLLM that is newer than those known to work.

    Raises DeltaConfigError for one that is older, or newer and without what the plugin builds on.
    A build from source may have no version that says anything.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    release = (int(numbers[1]), int(numbers[2])) if numbers else FIRST
    if release < FIRST:
        raise DeltaConfigError(f"deltadecode works with vLLM {SUPPORTED}, got {version}")
    if release <= LAST:
        return None
    lacks = interface.missing(cpu)
    if lacks:
        raise DeltaConfigError(
            f"deltadecode works with vLLM {SUPPORTED}, and {version} has no {', no '.join(lacks)}"
        )
    return f"known to work with vLLM {SUPPORTED}; {version} has the same interface, so it may"


def settings_of(vllm_config: Any) -> ServingSettings:
    """Settings of an engine; its configuration is complete or not."""
    additional = vllm_config.additional_config
    user_values = additional.get(KEY) if isinstance(additional, dict) else None
    return resolve(user_values, vllm_config.model_config.hf_config)


def most_tokens(vllm_config: Any) -> int:
    """Most new tokens of a decode row: one, and drafts."""
    speculative = getattr(vllm_config, "speculative_config", None)
    return 1 + (getattr(speculative, "num_speculative_tokens", None) or 0)


def numbers_of_tokens(vllm_config: Any) -> list[int]:
    """Numbers of new tokens of a decode row that have kernels of their own, ascending."""
    most = most_tokens(vllm_config)
    if is_lossless(vllm_config):
        # Rows of one token are the stock backend's then.
        return [1 + drafts for drafts in draft_choices(most - 1)]
    return sorted({1, most})


def check_backend(vllm_config: Any) -> None:
    """Refuse to draft where layers have another attention than ours; DeltaConfigError."""
    if is_lossless(vllm_config) and not is_chosen(vllm_config):
        backend = getattr(vllm_config.attention_config.backend, "name", None)
        raise DeltaConfigError(
            f"{PROPOSER} in --speculative-config needs --attention-backend {BACKEND}, got "
            f"{backend or 'none'}"
        )


def schedule_ahead(vllm_config: Any) -> None:
    """Have the engine schedule asynchronously, as vLLM does beside proposers that it knows.

    It asks of a proposer that tokens stay on the device, which ours does (runner.py).
    """
    from vllm.platforms import current_platform
    from vllm.v1.executor.abstract import Executor

    scheduler = vllm_config.scheduler_config
    supports = Executor.get_class(vllm_config).supports_async_scheduling()
    if supports and scheduler.scheduler_cls is None and not current_platform.is_cpu():
        scheduler.async_scheduling = True
        setattr(scheduler, AHEAD, True)


def key_value_views(
    kv_cache: Tensor, head_size: int, float8: bool = False
) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer's cache: [blocks, block_size, Hkv, D] views, last stride 1.

    With FlashAttention in vLLM 0.24 the cache is [blocks, 2, block_size, Hkv, D]. On CPUs and in
    0.32 it is [blocks, Hkv, block_size, 2 D], a token's key beside its value. Of ``float8`` caches
    vLLM knows the bytes only.
    """
    if float8:
        kv_cache = kv_cache.view(torch.float8_e4m3fn)
    if kv_cache.dim() == 5:
        k_cache, v_cache = kv_cache.unbind(1)
    else:
        k_cache, v_cache = kv_cache.transpose(1, 2).split(head_size, dim=-1)
    return k_cache, v_cache


def float8_lacks(vllm_config: Any) -> str | None:
    """What the machine lacks for float8 caches by the word of the stock backend; None if nothing.

    vLLM itself says so when the weights are loaded.
    """
    from vllm.platforms import current_platform

    model = vllm_config.model_config
    if not current_platform.is_cpu():
        from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

        if FlashAttentionBackend.supports_kv_cache_dtype("fp8"):
            return None
        return "needs what FlashAttention of vLLM has for it: version 3, on GPUs such as H100"
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    try:
        _get_attn_isa(model.dtype, 32, model.get_head_size(), "fp8")
    except NotImplementedError as error:
        return f"is more than vLLM computes here ({error})"
    return None


def salt_requests(scheduler: Any, salt: str) -> None:
    """Put ``salt`` before the cache salt of each request of a scheduler's engine.

    Block hashes begin with it, and so does what KV connectors and offloading look blocks up by. A
    user's own salt still divides the requests that carry it from others.
    """
    from vllm.v1.engine.core import EngineCore

    setattr(scheduler, _SALT, salt)
    wrap_once(EngineCore, "preprocess_add_request", _salted)


def _salted(preprocess: Callable[..., Any]) -> Any:
    def preprocess_add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        salt = getattr(self.scheduler, _SALT, None)
        if salt is not None:
            request.cache_salt = f"{salt}/{request.cache_salt}" if request.cache_salt else salt
        return preprocess(self, request, *args, **kwargs)

    return preprocess_add_request


def rows_after(common: Any, first: int) -> Any:
    """CommonAttentionMetadata of the rows after the ``first`` ones."""
    from vllm.v1.worker.ubatch_utils import UBatchSlice, split_attn_metadata

    token = int(common.query_start_loc_cpu[first])
    rest = UBatchSlice(slice(first, common.num_reqs), slice(token, common.num_actual_tokens))
    return split_attn_metadata([rest], common)[0]


def pass_prompts_to_builders(vllm_config: Any) -> None:
    """Let metadata builders know which rows belong to prompts.

    The second model runner of vLLM 0.24 (its default for Llama, Mistral, Qwen3 and a few more on
    GPUs) knows it, and leaves it out of what it hands to builders. Later ones hand it on.
    """
    if not getattr(vllm_config, "use_v2_model_runner", False):
        return
    from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    if "is_prefilling" not in inspect.signature(build_attn_metadata).parameters:
        pass_on_prompts(DefaultModelState)


def pass_on_prompts(state: Any) -> None:
    """Have a ModelState set the attribute ``prefilling`` of each builder that has one.

    Its ``prepare_attn`` takes ``input_batch`` and ``attn_groups``.
    """
    names = list(inspect.signature(state.prepare_attn).parameters)
    places = names.index("input_batch"), names.index("attn_groups")
    wrap_once(state, "prepare_attn", partial(_pass_on, places=places))


def _pass_on(prepare: Callable[..., Any], places: tuple[int, int]) -> Any:
    batch_place, groups_place = places

    def prepare_attn(*args: Any, **kwargs: Any) -> Any:
        batch = kwargs["input_batch"] if "input_batch" in kwargs else args[batch_place]
        groups = kwargs["attn_groups"] if "attn_groups" in kwargs else args[groups_place]
        for group in chain.from_iterable(groups):
            builder = group.get_metadata_builder(0)
            if hasattr(builder, "prefilling"):
                builder.prefilling = torch.from_numpy(batch.is_prefilling_np)
        return prepare(*args, **kwargs)

    return prepare_attn
