"""The parts of a CLSA model on vLLM's layers; names and equations are those of models/clsa."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.rotary_embedding import get_rope

from deltadecode.engines.vllm.clsa.windows import without_schedule

Attend = Callable[[Tensor], Tensor]


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            size, [inner, inner], bias=False, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(inner, size, bias=False, prefix=f"{prefix}.down_proj")
        self.act_fn = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] to the same."""
        out: Tensor = self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]
        return out


class SelfAttention(nn.Module):
    """vLLM's attention over a window, or over everything in a Transformer."""

    def __init__(self, config: Any, cache_config: Any, prefix: str) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        heads, own = config.num_attention_heads, config.num_key_value_heads
        self.dim = dim = config.head_dim
        self.sizes = [heads // ranks * dim, *2 * [max(1, own // ranks) * dim]]
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, dim, heads, own, bias=False, prefix=f"{prefix}.qkv_proj"
        )
        self.o_proj = RowParallelLinear(
            heads * dim, config.hidden_size, bias=False, prefix=f"{prefix}.o_proj"
        )
        self.q_norm = RMSNorm(dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            dim,
            max_position=config.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
        window = None if config.mode == "transformer" else config.sliding_window
        self.attn = Attention(
            heads // ranks,
            dim,
            dim**-0.5,
            num_kv_heads=max(1, own // ranks),
            cache_config=cache_config,
            per_layer_sliding_window=window,
            prefix=f"{prefix}.attn",
        )
        if window is not None:
            self.attn.attn_backend = without_schedule(self.attn.attn_backend)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """[T, hidden] to the same."""
        q, k, v = self.qkv_proj(x)[0].split(self.sizes, dim=-1)
        q, k = _normed(q, self.q_norm, self.dim), _normed(k, self.k_norm, self.dim)
        q, k = self.rotary_emb(positions, q.flatten(1), k.flatten(1))
        out: Tensor = self.o_proj(self.attn(q, k, v))[0]
        return out


class CrossAttention(nn.Module):
    """Queries to what all layers of the cross-decoder share."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        self.dim, inner = config.head_dim, config.num_attention_heads * config.head_dim
        self.q_proj = ColumnParallelLinear(
            config.hidden_size, inner, bias=False, prefix=f"{prefix}.q_proj"
        )
        self.o_proj = RowParallelLinear(
            inner, config.hidden_size, bias=False, prefix=f"{prefix}.o_proj"
        )
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """[Q, hidden] to the same."""
        q = _normed(self.q_proj(x)[0], self.q_norm, self.dim)
        out: Tensor = self.o_proj(attend(q).flatten(1))[0]
        return out


class Layer(nn.Module):
    """A pre-norm layer; its input and output are a sum's two parts, as vLLM's norm takes them."""

    def __init__(self, config: Any, attention: nn.Module, prefix: str) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = MLP(config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, rest: Tensor | None, how: Any) -> tuple[Tensor, Tensor]:
        """``how`` is what the attention takes: positions, or a way to attend."""
        x, rest = normed_sum(self.input_layernorm, x, rest)
        x = self.self_attn(x, how)
        x, rest = normed_sum(self.post_attention_layernorm, x, rest)
        return self.mlp(x), rest


class SharedKV(nn.Module):
    """Keys and values of the cross-decoder, side by side."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        self.dim = config.head_dim
        inner = config.num_key_value_heads * config.head_dim
        self.kv_proj = MergedColumnParallelLinear(
            config.hidden_size, [inner, inner], bias=False, prefix=f"{prefix}.kv_proj"
        )
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.heads: int = config.num_key_value_heads // get_tensor_model_parallel_world_size()
        # Numbers of a token on this rank.
        self.size: int = 2 * self.heads * self.dim

    def forward(self, memory: Tensor) -> Tensor:
        """[T, size] of [T, hidden]."""
        k, v = self.kv_proj(memory)[0].chunk(2, dim=-1)
        return torch.cat((_normed(k, self.k_norm, self.dim).flatten(1), v), dim=1)

    def views(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [blocks, block_size, Hkv, D] of [blocks, block_size, size]."""
        k, v = blocks.unflatten(2, (2, self.heads, self.dim)).unbind(2)
        return k, v


class Indexer(nn.Module):
    """Index queries, scaled, and keys; each rank has the whole head, so all select the same."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        self.size = size = config.index_head_dim
        self.scale = size**-0.5
        self.qk_proj = MergedColumnParallelLinear(
            config.hidden_size, [size, size], bias=False, prefix=f"{prefix}.qk_proj",
            disable_tp=True,
        )  # fmt: skip

    def forward(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [T, d] of [T, hidden]."""
        query, key = self.qk_proj(memory)[0].split(self.size, dim=-1)
        return query * self.scale, key


def normed_sum(norm: RMSNorm, x: Tensor, rest: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm of x + rest, and the sum."""
    if rest is None:
        return norm(x), x
    out, rest = norm(x, rest)
    return out, rest


def _normed(x: Tensor, norm: RMSNorm, dim: int) -> Tensor:
    """Heads [T, H, dim] of [T, H * dim], normed."""
    out: Tensor = norm(x.unflatten(-1, (-1, dim)).contiguous())
    return out
