"""What the plugin wraps, subclasses and reads of vLLM, to look for in an unknown release."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from typing import Any

_BUILD = ("common_prefix_len", "common_attn_metadata", "fast_build")
_FORWARD = ("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output")
_METADATA = ("num_actual_tokens", "max_seq_len", "seq_lens", "block_table")
_BACKEND = ("get_impl_cls", "get_builder_cls", "get_supported_kernel_block_sizes")

# Place -> parameters of a function, or members of a class.
_EVERYWHERE = {
    "vllm.config:get_current_vllm_config_or_none": (),
    "vllm.distributed:get_tp_group": (),
    "vllm.distributed.parallel_state:GroupCoordinator.all_gather": ("input_", "dim"),
    "vllm.distributed.utils:get_pp_indices": ("num_hidden_layers", "pp_rank", "pp_size"),
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": ("usage_context",),
    "vllm.forward_context:get_forward_context": (),
    "vllm.forward_context:set_forward_context": (
        "attn_metadata",
        "vllm_config",
        "num_tokens",
        "slot_mapping",
    ),
    "vllm.model_executor.models.utils:extract_layer_index": ("layer_name",),
    "vllm.v1.attention.backend:AttentionLayer": ("_q_scale", "_k_scale", "_v_scale"),
    "vllm.v1.attention.backend:AttentionCGSupport": ("UNIFORM_BATCH",),
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "query_start_loc_cpu",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
    ),
    "vllm.v1.attention.backend:AttentionMetadataBuilder": ("_init_reorder_batch_threshold",),
    "vllm.v1.attention.backend:MultipleOf": (),
    "vllm.v1.core.sched.output:CachedRequestData": ("req_ids", "num_computed_tokens"),
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "num_scheduled_tokens",
        "total_num_scheduled_tokens",
        "scheduled_cached_reqs",
        "scheduled_spec_decode_tokens",
        "num_spec_tokens_to_schedule",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": ("scheduler_output",),
    "vllm.v1.core.sched.scheduler:Scheduler.make_stats": (),
    "vllm.v1.engine:EngineCoreRequest": ("cache_salt",),
    "vllm.v1.engine.core:EngineCore.preprocess_add_request": ("request",),
    "vllm.v1.engine.output_processor:OutputProcessor.update_scheduler_stats": (),
    "vllm.v1.metrics.stats:SchedulerStats": ("kv_connector_stats",),
    "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.initialize_cudagraph_keys": (
        "cudagraph_mode",
        "uniform_decode_query_len",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": (
        "initialize_kv_cache",
        "capture_model",
        "_copy_valid_sampled_token_count",
        "_is_all_reqs_chunked_prefill",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync": (
        "scheduler_output",
        "sampler_output",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._determine_batch_execution_and_padding": (
        "num_tokens",
        "num_reqs",
        "max_num_scheduled_tokens",
        "force_uniform_decode",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids": (
        "scheduler_output",
        "spec_decode_metadata",
        "common_attn_metadata",
    ),
    "vllm.v1.worker.ubatch_utils:UBatchSlice": ("request_slice", "token_slice"),
    "vllm.v1.worker.ubatch_utils:split_attn_metadata": (
        "ubatch_slices",
        "common_attn_metadata",
    ),
}
_CPU = {
    "vllm.v1.attention.backends.cpu_attn:_get_attn_isa": (
        "dtype",
        "block_size",
        "head_size",
        "kv_cache_dtype",
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend": _BACKEND,
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update": (
        "layer",
        "key",
        "value",
        "kv_cache",
        "slot_mapping",
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward": _FORWARD,
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadata": (*_METADATA, "query_start_loc"),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build": _BUILD,
}
_GPU = {
    "vllm.distributed.device_communicators.pynccl:PyNcclCommunicator.all_reduce": (
        "in_tensor",
        "out_tensor",
        "op",
    ),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend": _BACKEND,
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward": _FORWARD,
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadata": (
        *_METADATA,
        "scheduler_metadata",
    ),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder.build": _BUILD,
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder.get_cudagraph_support": (
        "vllm_config",
        "kv_cache_spec",
    ),
}


def missing(cpu: bool) -> list[str]:
    """What the installed vLLM lacks of that, in words; empty where nothing is known to be wrong."""
    return list(_missing({**_EVERYWHERE, **(_CPU if cpu else _GPU)}))


def _missing(places: dict[str, tuple[str, ...]]) -> Iterator[str]:
    for place, names in places.items():
        module, _, path = place.partition(":")
        try:
            thing = import_module(module)
            for name in path.split("."):
                thing = getattr(thing, name)
        except (ImportError, AttributeError):
            yield place.replace(":", ".")
            continue
        known = _names(thing)
        for name in names:
            if name not in known:
                yield f"{name} of {place.replace(':', '.')}"


def _names(thing: Any) -> set[str]:
    if not inspect.isclass(thing):
        return set(inspect.signature(thing).parameters)
    # Fields without a default are no attributes of their class.
    fields = (name for each in thing.__mro__ for name in vars(each).get("__annotations__", ()))
    return {*dir(thing), *fields}
