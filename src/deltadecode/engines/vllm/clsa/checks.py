"""What an engine for a CLSA model is checked for, and what is set for it."""

from __future__ import annotations

from typing import Any

from deltadecode.errors import ModelConfigError, UnsupportedCacheError, UnsupportedModelError


def exits_early(config: Any) -> bool:
    """Whether only the rows' last tokens go through the cross-decoder: YOCO's early exit.

    ``--hf-overrides '{"early_exit": false}'`` turns it off, for logprobs of prompts.
    """
    return config.mode != "transformer" and bool(getattr(config, "early_exit", True))


def prepare_model(model_config: Any) -> None:
    """Say which layers have a window, in the words that vLLM knows."""
    config = model_config.hf_config
    config.check()
    early = getattr(config, "early_exit", True)
    if type(early) is not bool:
        raise ModelConfigError(f"early_exit must be true or false, got {early!r}")
    if config.mode == "transformer":
        # It has none, but vLLM would give one to all layers.
        config.sliding_window = None
        return
    first, rest = config.self_layers, config.num_hidden_layers - config.self_layers
    config.layer_types = ["sliding_attention"] * first + ["full_attention"] * rest


def prepare_engine(vllm_config: Any) -> None:
    """Refuse what the model cannot do; whole steps of decoding are graphs, prompts are plain.

    Raises
    ------
    UnsupportedModelError, UnsupportedCacheError
        In one line.
    """
    from vllm.config import CompilationMode, CUDAGraphMode

    graphs = vllm_config.compilation_config
    if graphs.mode is None:
        graphs.mode = CompilationMode.NONE
    if graphs.cudagraph_mode is None:
        graphs.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise UnsupportedModelError(
            "the layers of a CLSA model share a cache, so --pipeline-parallel-size must be 1, "
            f"got {parallel.pipeline_parallel_size}"
        )
    ranks, heads = parallel.tensor_parallel_size, config.num_key_value_heads
    if heads % ranks:
        raise UnsupportedModelError(
            f"--tensor-parallel-size must divide the {heads} key-value heads of a CLSA model, "
            f"got {ranks}"
        )
    if config.mode == "transformer":
        return
    index, size = config.index_head_dim, 2 * heads // ranks * config.head_dim
    if config.mode == "clsa" and max(index, size) % min(index, size):
        raise UnsupportedModelError(
            "vLLM's blocks hold whole tokens of every cache, so index_head_dim must divide the "
            f"{size} numbers of a token's shared keys and values on a rank, got {index}"
        )
    if vllm_config.speculative_config is not None:
        raise UnsupportedModelError(
            "a CLSA model decodes one token a row, so --speculative-config cannot be given"
        )
    dtype = vllm_config.cache_config.cache_dtype
    if dtype not in ("auto", str(vllm_config.model_config.dtype).removeprefix("torch.")):
        raise UnsupportedCacheError(
            f"a CLSA model keeps its tokens in its own dtype, got --kv-cache-dtype {dtype}"
        )


def check_request(config: Any, params: Any) -> None:
    """Refuse logprobs of a prompt's tokens where these leave early; VLLMValidationError."""
    from vllm.exceptions import VLLMValidationError

    asked = getattr(params, "prompt_logprobs", None)
    if exits_early(config) and asked is not None:
        # Of vLLM's class, which its server answers with code 400.
        raise VLLMValidationError(
            "prompt_logprobs needs the whole prompt in the cross-decoder, which an engine has with "
            f"--hf-overrides '{{\"early_exit\": false}}', got {asked}"
        )
