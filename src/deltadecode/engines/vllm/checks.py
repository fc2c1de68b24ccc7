"""What an engine's configuration must satisfy, checked before any process or weight is loaded."""

from __future__ import annotations

from typing import Any

from deltadecode.config import MOST_DRAFTS
from deltadecode.engines.serving.settings import ServingSettings
from deltadecode.engines.vllm import versions
from deltadecode.errors import DeltaConfigError, UnsupportedCacheError, UnsupportedModelError
from deltadecode_vllm import is_lossless

FLOAT8_DTYPES = ("fp8", "fp8_e4m3")
CACHE_DTYPES = ("auto", "bfloat16", "float16", *FLOAT8_DTYPES)


def find_settings(vllm_config: Any) -> ServingSettings:
    """Settings of a new engine.

    Raises DeltaConfigError as :func:`~deltadecode.engines.serving.settings.resolve`, and
    UnsupportedModelError when the model has nothing to plan, or something not computed.
    """
    settings = versions.settings_of(vllm_config)
    model = vllm_config.model_config
    name = type(model.hf_config).__name__
    runner = getattr(model, "runner_type", "generate")
    if getattr(model, "use_mla", False) or runner != "generate":
        raise UnsupportedModelError(
            f"{name} runs with MLA or as a {runner!r} model; DELTA plans decoders of text"
        )
    if getattr(model, "uses_alibi", False):
        raise UnsupportedModelError(f"{name} uses ALiBi, which the operations do not compute")
    # vLLM gives every layer this window, whatever the model's configuration says of the layer.
    window = vllm_config.cache_config.sliding_window
    if window is not None and window < model.max_model_len:
        raise UnsupportedModelError(
            f"{name} has a sliding window of {window} tokens, and --max-model-len is "
            f"{model.max_model_len}; DELTA plans full-attention layers only"
        )
    _check_heads(model, vllm_config.parallel_config)
    return settings


def check_machine(platform: Any, dtype: str, batch_invariant: bool) -> None:
    """Refuse what vLLM would refuse of the stock backend too late, and what it cannot know.

    ``platform`` is vLLM's, ``dtype`` the model's. Raises DeltaConfigError.
    """
    if batch_invariant:
        raise DeltaConfigError(
            "VLLM_BATCH_INVARIANT must be off with DELTA: its kernels divide a row by the number "
            "of rows, so sums may differ in their last bits"
        )
    if platform.is_cpu():
        return
    if not platform.is_cuda():
        raise DeltaConfigError(
            f"DELTA runs on CUDA GPUs and on CPUs, and this vLLM on {platform.device_name}; it "
            f"serves without --attention-backend CUSTOM"
        )
    capability = platform.get_device_capability()
    if capability is not None and tuple(capability) < (8, 0):
        raise DeltaConfigError(
            f"DELTA needs a GPU of compute capability 8.0 or more, got "
            f"{capability[0]}.{capability[1]}; vLLM serves without --attention-backend CUSTOM"
        )
    if dtype not in ("bfloat16", "float16"):
        raise DeltaConfigError(
            f"--dtype must be bfloat16 or float16 with DELTA on a GPU, got {dtype}"
        )


def check_engine(vllm_config: Any, settings: ServingSettings) -> None:
    """Refuse what the backend cannot run.

    Raises
    ------
    UnsupportedCacheError
        For a cache dtype or block size that the kernels lack.
    DeltaConfigError
        For options that divide a sequence or the plan.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    check_machine(current_platform, dtype, envs.VLLM_BATCH_INVARIANT)
    cache = vllm_config.cache_config
    check_cache_dtype(vllm_config, dtype)
    page = settings.config.page_size
    if cache.block_size is not None and cache.block_size % page:
        raise UnsupportedCacheError(
            f"--block-size must be a multiple of page_size, got block size {cache.block_size} "
            f"and page_size {page}"
        )
    if getattr(cache, "kv_sharing_fast_prefill", False):
        raise DeltaConfigError(
            "--kv-sharing-fast-prefill must be off with DELTA: it runs a prompt's last token as a "
            "decode row in the layers that share a cache"
        )
    drafts = getattr(vllm_config.speculative_config, "attention_backend", None)
    if drafts is not None and drafts is vllm_config.attention_config.backend:
        raise DeltaConfigError(
            f"attention_backend of --speculative-config must be another than {drafts.name} with "
            f"DELTA, which plans the model's own layers only; leave it out"
        )
    parallel = vllm_config.parallel_config
    for name in ("decode", "prefill"):
        size = getattr(parallel, f"{name}_context_parallel_size", 1)
        if size > 1:
            raise DeltaConfigError(
                f"--{name}-context-parallel-size must be 1 with DELTA, got {size}"
            )
    if is_lossless(vllm_config):
        check_lossless(vllm_config, settings)
    check_stages(settings, parallel.pipeline_parallel_size)


def check_lossless(vllm_config: Any, settings: ServingSettings) -> None:
    """Refuse what cannot draft with its own weights and cache.

    Raises
    ------
    DeltaConfigError
        For a number of drafts out of range, or an option of vLLM that drafts know nothing of.
    UnsupportedModelError
        For a model with other layers than full attention, or inputs other than text.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    drafts = vllm_config.speculative_config.num_speculative_tokens
    if not 1 <= drafts <= MOST_DRAFTS:
        raise DeltaConfigError(
            f"num_speculative_tokens must be in 1..{MOST_DRAFTS} in lossless mode, got {drafts}"
        )
    name, plan = type(model.hf_config).__name__, settings.plan
    if len(plan.attention_layers) < plan.num_layers:
        raise UnsupportedModelError(
            f"{name} has full attention in {len(plan.attention_layers)} of {plan.num_layers} "
            f"layers; in vLLM, lossless mode takes models with full attention in all of them"
        )
    if getattr(model, "is_multimodal_model", False) or getattr(model, "uses_mrope", False):
        raise UnsupportedModelError(
            f"{name} reads more than text; in vLLM, lossless mode takes models of text only"
        )
    ranks = parallel.data_parallel_size if getattr(model, "is_moe", False) else 1
    options = {
        "--pipeline-parallel-size must be 1": parallel.pipeline_parallel_size > 1,
        "--data-parallel-size of a model with experts must be 1": ranks > 1,
        "--enable-lora must be off": vllm_config.lora_config is not None,
        "--enable-prompt-embeds must be off": getattr(model, "enable_prompt_embeds", False),
        "--kv-transfer-config must not be given": vllm_config.kv_transfer_config is not None,
        "--enable-dbo must be off": getattr(parallel, "use_ubatching", False),
        # It would discard what drafts keep beside the cache.
        "--enable-sleep-mode must be off": getattr(model, "enable_sleep_mode", False),
    }
    for rule, broken in options.items():
        if broken:
            raise DeltaConfigError(f"{rule} in lossless mode, whose drafts do without")


def check_cache_dtype(vllm_config: Any, dtype: str) -> None:
    """Refuse cache dtypes; one of the checkpoint's own counts where the user names none.

    ``dtype`` is the model's. Raises UnsupportedCacheError.
    """
    cache = vllm_config.cache_config
    scheme = getattr(vllm_config.quant_config, "kv_cache_scheme", None)
    if cache.cache_dtype not in CACHE_DTYPES:
        raise UnsupportedCacheError(
            f"--kv-cache-dtype must be {', '.join(CACHE_DTYPES[:-1])} or {CACHE_DTYPES[-1]} with "
            f"DELTA, got {cache.cache_dtype}"
        )
    float8 = cache.cache_dtype in FLOAT8_DTYPES or (scheme and cache.cache_dtype == "auto")
    if not float8 and cache.cache_dtype not in ("auto", dtype):
        raise UnsupportedCacheError(
            f"--kv-cache-dtype must be auto, fp8 or that of the model with DELTA, {dtype}, got "
            f"{cache.cache_dtype}"
        )
    if not float8:
        return
    if getattr(cache, "calculate_kv_scales", False):
        raise UnsupportedCacheError(
            "--calculate-kv-scales must be off with DELTA, whose kernels are made for the scales "
            "of the checkpoint, or for 1"
        )
    if scheme and scheme.get("strategy") == "attn_head":
        raise UnsupportedCacheError(
            "the checkpoint has a float8 scale for each head, and DELTA takes one for all; vLLM "
            "serves it without --attention-backend CUSTOM"
        )
    lacks = versions.float8_lacks(vllm_config)
    if lacks is not None:
        without = dtype if scheme else "auto"
        raise UnsupportedCacheError(
            f"a float8 cache {lacks}; --kv-cache-dtype {without} does without"
        )


def _check_heads(model: Any, parallel: Any) -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return
    from deltadecode.ops.triton import MOST_GROUP, MOST_HEAD_DIM

    # Gemma 4 gives full-attention layers a head size of their own.
    size = max(model.get_head_size(), getattr(model.hf_text_config, "global_head_dim", None) or 0)
    group = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
    if size > MOST_HEAD_DIM or group > MOST_GROUP:
        raise UnsupportedModelError(
            f"the kernels take head sizes up to {MOST_HEAD_DIM} and {MOST_GROUP} query heads per "
            f"KV head, got {size} and {group}"
        )


def check_stages(settings: ServingSettings, stages: int) -> None:
    """Refuse pipeline stages whose sparse layers read pages of another stage.

    Raises DeltaConfigError with the first of them, its layers, and the Δ-layers that all need.
    """
    from vllm.distributed.utils import get_pp_indices

    plan, lacking = settings.plan, []
    for stage in range(stages):
        try:
            first, end = get_pp_indices(plan.num_layers, stage, stages)
        except ValueError as error:  # of VLLM_PP_LAYER_PARTITION
            raise DeltaConfigError(
                f"no pipeline stages for {plan.num_layers} layers: {error}"
            ) from error
        for layer in range(first, end):
            source = plan.source(layer)
            if source is not None and source < first:
                lacking.append((stage, first, end - 1, layer, source))
                break  # with this one a Δ-layer, the others have one in their stage
    if lacking:
        stage, first, last, layer, source = lacking[0]
        deltas = sorted({*settings.config.delta_layers, *(each[3] for each in lacking)})
        raise DeltaConfigError(
            f"pipeline stage {stage} has layers {first} to {last}, and its sparse layer {layer} "
            f"needs Δ-layer {source} of another stage; give it its own: "
            f'"delta_layers": {deltas}'
        )
