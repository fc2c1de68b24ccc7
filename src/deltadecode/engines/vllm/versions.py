"""Everything that differs between vLLM 0.24 and 0.32."""

from __future__ import annotations

import functools
import inspect
import re
from itertools import chain
from typing import Any

from torch import Tensor

FIRST, LAST = (0, 24), (0, 32)
SUPPORTED = f"{FIRST[0]}.{FIRST[1]} to {LAST[0]}.{LAST[1]}"


def outside_range(version: str) -> str | None:
    """Why a version of vLLM is not one of those that the plugin is made for.

    Parameters
    ----------
    version : str
        As vLLM gives it.

    Returns
    -------
    str or None
        One line with the range; None when it is inside.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or FIRST <= (int(numbers[1]), int(numbers[2])) <= LAST:
        # A build from source may have no version that says anything.
        return None
    return f"deltadecode works with vLLM {SUPPORTED}, got {version}"


def key_value_views(kv_cache: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer's cache.

    Parameters
    ----------
    kv_cache : Tensor
        vLLM 0.24 with FlashAttention: [blocks, 2, block_size, Hkv, D]. On CPUs and in 0.32:
        [blocks, Hkv, block_size, 2 D], a token's key beside its value.
    head_size : int
        D.

    Returns
    -------
    k_cache, v_cache : Tensor
        [blocks, block_size, Hkv, D] views, last stride 1.
    """
    if kv_cache.dim() == 5:
        k_cache, v_cache = kv_cache.unbind(1)
    else:
        k_cache, v_cache = kv_cache.transpose(1, 2).split(head_size, dim=-1)
    return k_cache, v_cache


def register_backend(path: str) -> str | None:
    """Put a backend under the name ``CUSTOM``, the one name that all versions pickle.

    Parameters
    ----------
    path : str
        Of the class.

    Returns
    -------
    str or None
        The path that holds the name already, which is left alone; None when it is ours.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != path:
        return str(custom.get_path())
    register_backend(custom, path)
    return None


def chosen(vllm_config: Any, path: str) -> bool:
    """Whether an engine is to run a backend that is registered under ``CUSTOM``.

    Parameters
    ----------
    vllm_config : vllm.config.VllmConfig
        Of the engine.
    path : str
        Of the class.

    Returns
    -------
    bool
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    custom = AttentionBackendEnum.CUSTOM
    return (
        vllm_config.attention_config.backend is custom
        and custom.is_overridden()
        and custom.get_path() == path
    )


def let_cpu_choose(path: str) -> None:
    """Let the CPU platform, which knows one backend only, take the one under ``CUSTOM``.

    Parameters
    ----------
    path : str
        Of the class.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    platform = type(current_platform)
    choose = platform.get_attn_backend_cls
    if not current_platform.is_cpu() or hasattr(choose, "_deltadecode"):
        return

    @functools.wraps(choose)
    def get_attn_backend_cls(selected_backend: Any, *args: Any, **kwargs: Any) -> str:
        if selected_backend is AttentionBackendEnum.CUSTOM:
            return path
        return str(choose(selected_backend, *args, **kwargs))

    get_attn_backend_cls._deltadecode = True  # type: ignore[attr-defined]
    platform.get_attn_backend_cls = staticmethod(get_attn_backend_cls)


def rows_after(common: Any, first: int) -> Any:
    """Metadata of the rows after a number of decode rows.

    Parameters
    ----------
    common : CommonAttentionMetadata
        Of a batch whose first rows have one token each.
    first : int
        How many rows to leave out.

    Returns
    -------
    CommonAttentionMetadata
    """
    from vllm.v1.worker.ubatch_utils import UBatchSlice, split_attn_metadata

    rest = UBatchSlice(slice(first, common.num_reqs), slice(first, common.num_actual_tokens))
    return split_attn_metadata([rest], common)[0]


def tell_builders_of_prompts(vllm_config: Any) -> None:
    """Let metadata builders know which rows belong to prompts.

    The second model runner of vLLM 0.24 (its default for Llama, Mistral, Qwen3 and a few more on
    GPUs) knows it, and leaves it out of what it hands to builders.

    Parameters
    ----------
    vllm_config : vllm.config.VllmConfig
        Of the engine.
    """
    if getattr(vllm_config, "use_v2_model_runner", False):
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        pass_on_prompts(DefaultModelState)


def pass_on_prompts(state: Any) -> None:
    """Have a model state set the attribute ``told`` of each builder that has one.

    Parameters
    ----------
    state : type
        A vLLM ModelState; its ``prepare_attn`` takes ``input_batch`` and ``attn_groups``.
    """
    prepare = state.prepare_attn
    if hasattr(prepare, "_deltadecode"):
        return
    signature = inspect.signature(prepare)

    @functools.wraps(prepare)
    def prepare_attn(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        for group in chain.from_iterable(given["attn_groups"]):
            builder = group.get_metadata_builder(0)
            if hasattr(builder, "told"):
                builder.told = given["input_batch"].is_prefilling_np
        return prepare(*args, **kwargs)

    prepare_attn._deltadecode = True  # type: ignore[attr-defined]
    state.prepare_attn = prepare_attn
