"""Time of one decode step on the CPU: stock Transformers beside DELTA, on a random model.

Random weights cost the same as trained ones, and a cache can be filled with random keys and values:
no download and no prefill is needed to time a step at any context.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

# From the package itself: `benchmarks --base` runs this file with other commits, whose modules may
# be named differently.
from deltadecode import DeltaCache, DeltaConfig, enable

# The plan of the CPU benchmark: arXiv 2510.09883's fractions of depth, in 24 layers.
PLAN = DeltaConfig(sink_pages=0, dense_layers=(0, 1), delta_layers=(2, 12, 18))
# Which token is decoded does not change the work.
_TOKEN = 1


def qwen2_05b() -> Qwen2Config:
    """Shape of Qwen2.5-0.5B, with positions for a context of 32k and some steps."""
    return Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768 + 1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )


def random_model(
    config: Qwen2Config, dtype: torch.dtype, like: Qwen2ForCausalLM | None = None
) -> Qwen2ForCausalLM:
    """Make a model with random weights, or those of ``like``, and ``sdpa`` in a second or two."""
    config = Qwen2Config.from_dict(config.to_dict())
    config._attn_implementation = "sdpa"
    config.dtype = dtype
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    # The only buffers, computed by the constructor: not there on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    if like is not None:
        model.load_state_dict(like.state_dict(), assign=True)
    else:
        chunk = torch.randn(2**18, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
        weights = {name: _tiled(chunk, weight) for name, weight in model.named_parameters()}
        model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    model.eval()
    return model


def fill_cache(cache: DynamicCache, config: Qwen2Config, context: int, dtype: torch.dtype) -> None:
    """Store ``context`` random tokens in an empty cache, the same in every cache of a shape."""
    dim = config.hidden_size // config.num_attention_heads
    heads = config.num_key_value_heads or config.num_attention_heads
    generator = torch.Generator().manual_seed(1)
    for layer in range(config.num_hidden_layers):
        shape = (2, 1, heads, context, dim)
        keys, values = torch.randn(shape, generator=generator).to(dtype)
        # Copies, since a cache may keep what it is given, and the pair shares its storage.
        cache.update(keys.clone(), values.clone(), layer)


@dataclass(frozen=True)
class StepTime:
    """Median times of one decode step, in milliseconds, over ``steps`` steps of each side.

    ``context`` tokens are in the cache before the first step.
    """

    context: int
    full_ms: float
    delta_ms: float
    steps: int

    @property
    def ratio(self) -> float:
        """Stock time ÷ DELTA time; above 1, DELTA is faster."""
        return self.full_ms / self.delta_ms


class StepTimer:
    """Stock and DELTA with the same weights, ready to time steps at any context."""

    def __init__(self, config: Qwen2Config, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype
        self.full = random_model(config, dtype)
        self.delta = random_model(config, dtype, like=self.full)

    def measure(
        self,
        context: int,
        cfg: DeltaConfig,
        *,
        steps: int = 8,
        warmup: int = 2,
        on_ready: Callable[[], None] = lambda: None,
        on_step: Callable[[], None] = lambda: None,
    ) -> StepTime:
        """Time single steps of both sides, in turns, after ``warmup`` untimed steps of each.

        ``on_ready`` is called once the caches are filled, and ``on_step`` after each of the
        ``warmup + steps`` pairs of steps.
        """
        enable(self.delta, cfg)
        caches = DynamicCache(config=self.full.config), DeltaCache(self.delta.config)
        for cache in caches:
            fill_cache(cache, self.config, context, self.dtype)
        on_ready()
        times: tuple[list[float], list[float]] = ([], [])
        for step in range(warmup + steps):
            for model, cache, taken in zip((self.full, self.delta), caches, times, strict=True):
                seconds = timed_step(model, cache)
                if step >= warmup:
                    taken.append(seconds)
            on_step()
        full, delta = (1000 * median(taken) for taken in times)
        return StepTime(context, full, delta, steps)


@torch.inference_mode()
def decode_step(model: Qwen2ForCausalLM, cache: Any) -> Tensor:
    """Decode one token after what is in the cache; logits [1, 1, vocabulary]."""
    token = torch.tensor([[_TOKEN]])
    logits: Tensor = model(input_ids=token, past_key_values=cache, use_cache=True).logits
    return logits


def timed_step(model: Qwen2ForCausalLM, cache: Any) -> float:
    """Seconds of :func:`decode_step`."""
    start = time.perf_counter()
    decode_step(model, cache)
    return time.perf_counter() - start


def _tiled(chunk: Tensor, weight: Tensor) -> Tensor:
    """Fill a tensor of the shape of ``weight``; one chunk over and over, which is quick to make."""
    if weight.dim() == 1:
        return torch.ones(weight.shape, dtype=chunk.dtype)
    filled = torch.empty(weight.shape, dtype=chunk.dtype)
    for part in filled.view(-1).split(chunk.numel()):
        part.copy_(chunk[: part.numel()])
    return filled
