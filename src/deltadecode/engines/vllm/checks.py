"""What an engine's configuration must satisfy, checked before any process or weight is loaded."""

from __future__ import annotations

from typing import Any

from deltadecode.engines.vllm.settings import KEY, Settings, resolve
from deltadecode.errors import DeltaConfigError, UnsupportedCacheError, UnsupportedModelError

CACHE_DTYPES = ("auto", "bfloat16", "float16")


def find_settings(vllm_config: Any) -> Settings:
    """Settings of a new engine.

    Parameters
    ----------
    vllm_config : vllm.config.VllmConfig
        Of the engine.

    Returns
    -------
    Settings

    Raises
    ------
    DeltaConfigError
        See :func:`resolve`.
    UnsupportedModelError
        When the model has nothing to plan.
    """
    model = vllm_config.model_config
    settings = resolve(vllm_config.additional_config.get(KEY), model.hf_config)
    if getattr(model, "use_mla", False) or getattr(model, "runner_type", "generate") != "generate":
        raise UnsupportedModelError(
            f"{type(model.hf_config).__name__} runs with MLA or as a "
            f"{getattr(model, 'runner_type', None)!r} model; DELTA plans decoders of text"
        )
    if getattr(model, "uses_alibi", False):
        raise UnsupportedModelError(
            f"{type(model.hf_config).__name__} uses ALiBi, which the operations do not compute"
        )
    return settings


def check_engine(vllm_config: Any, settings: Settings) -> None:
    """Refuse what the backend cannot run.

    Parameters
    ----------
    vllm_config : vllm.config.VllmConfig
        Of the engine.
    settings : Settings
        Of its model.

    Raises
    ------
    UnsupportedCacheError
        For a cache dtype or block size that the kernels lack.
    DeltaConfigError
        For a plan that the engine's parallelism divides.
    UnsupportedModelError
        For heads that the kernels lack.
    """
    cache = vllm_config.cache_config
    if cache.cache_dtype not in CACHE_DTYPES:
        raise UnsupportedCacheError(
            f"--kv-cache-dtype must be {', '.join(CACHE_DTYPES[:-1])} or {CACHE_DTYPES[-1]} with "
            f"DELTA, got {cache.cache_dtype}"
        )
    page = settings.config.page_size
    if cache.block_size is not None and cache.block_size % page:
        raise UnsupportedCacheError(
            f"--block-size must be a multiple of page_size, got block size {cache.block_size} "
            f"and page_size {page}"
        )
    parallel = vllm_config.parallel_config
    if getattr(parallel, "decode_context_parallel_size", 1) > 1:
        raise DeltaConfigError(
            f"--decode-context-parallel-size must be 1 with DELTA, got "
            f"{parallel.decode_context_parallel_size}"
        )
    _check_heads(vllm_config.model_config, parallel)
    check_stages(settings, parallel.pipeline_parallel_size)


def _check_heads(model: Any, parallel: Any) -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return
    from deltadecode.ops.triton import MOST_GROUP, MOST_HEAD_DIM

    size = model.get_head_size()
    group = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
    if size > MOST_HEAD_DIM or group > MOST_GROUP:
        raise UnsupportedModelError(
            f"the kernels take head sizes up to {MOST_HEAD_DIM} and {MOST_GROUP} query heads per "
            f"KV head, got {size} and {group}"
        )


def check_stages(settings: Settings, stages: int) -> None:
    """Refuse a pipeline stage whose sparse layers read pages of another stage.

    Parameters
    ----------
    settings : Settings
        Of the model.
    stages : int
        Pipeline stages.

    Raises
    ------
    DeltaConfigError
        Naming the stage, its layers, and the Δ-layer to add.
    """
    from vllm.distributed.utils import get_pp_indices

    plan = settings.plan
    for stage in range(stages):
        first, end = get_pp_indices(plan.num_layers, stage, stages)
        for layer in range(first, end):
            source = plan.source(layer)
            if source is not None and source < first:
                deltas = sorted({*settings.config.delta_layers, layer})
                raise DeltaConfigError(
                    f"pipeline stage {stage} has layers {first} to {end - 1}, and its sparse layer "
                    f"{layer} needs Δ-layer {source} of another stage; give it its own: "
                    f'"delta_layers": {deltas}'
                )
