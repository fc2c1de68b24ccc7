"""The parts of a CLSA model: a layer with its own keys, one without, what the latter share.

Parameter names are those of Llama and Qwen 3 where these have the part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from deltadecode.models.clsa.attention import Attend
from deltadecode.models.clsa.configuration import ClsaConfig


class ClsaRMSNorm(nn.Module):
    """Root mean square norm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm of the last dimension."""
        # Under autocast x has another type; PyTorch's fused norm wants one for both.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class ClsaMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ClsaConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def rotary(config: ClsaConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, Q, D] of positions [B, Q]; computed anew, so nothing is stored."""
    exact = torch.promote_types(dtype, torch.float32)
    half = torch.arange(0, config.head_dim, 2, dtype=exact, device=positions.device)
    angles = positions[:, None, :, None].to(exact) * config.rope_theta ** (-half / config.head_dim)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of x [B, H, Q, D], in the half-rotation order of Llama."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class ClsaSelfAttention(nn.Module):
    """Attention with keys and values of its own, normed queries and keys, and positions."""

    def __init__(self, config: ClsaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        size, dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(size, config.num_attention_heads * dim, bias=False)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * dim, bias=False)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, size, bias=False)
        self.q_norm = ClsaRMSNorm(dim, config.rms_norm_eps)
        self.k_norm = ClsaRMSNorm(dim, config.rms_norm_eps)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], attend: Attend, cache: Any) -> Tensor:
        """[B, Q, hidden] to the same; ``turn`` is of :func:`rotary`."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), *turn)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), *turn)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        out: Tensor = self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return out


class ClsaCrossAttention(nn.Module):
    """Attention with queries of its own to keys and values that all such layers share."""

    def __init__(self, config: ClsaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        inner = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.q_norm = ClsaRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """[B, Q, hidden] to the same; k and v are [B, Hkv, T, D]."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)
        out: Tensor = self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return out


class _Layer(GradientCheckpointingLayer):
    def __init__(self, config: ClsaConfig, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = ClsaMLP(config)
        self.input_layernorm = ClsaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = ClsaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """[B, Q, hidden] to the same; the rest is what its attention takes."""
        x = x + self.self_attn(self.input_layernorm(x), *rest)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class ClsaSelfLayer(_Layer):
    """A layer of the self-decoder, or of a Transformer."""

    def __init__(self, config: ClsaConfig, layer_idx: int) -> None:
        super().__init__(config, ClsaSelfAttention(config, layer_idx))


class ClsaCrossLayer(_Layer):
    """A layer of the cross-decoder."""

    def __init__(self, config: ClsaConfig) -> None:
        super().__init__(config, ClsaCrossAttention(config))


class ClsaSharedKV(nn.Module):
    """Keys and values of the cross-decoder, made of the self-decoder's output, normed."""

    def __init__(self, config: ClsaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        inner = config.num_key_value_heads * config.head_dim
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_norm = ClsaRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Q, Hkv, D] of [B, Q, hidden]."""
        heads = (*memory.shape[:2], -1, self.head_dim)
        return self.k_norm(self.k_proj(memory).view(heads)), self.v_proj(memory).view(heads)


class ClsaIndexer(nn.Module):
    """One head that says which tokens the cross-decoder reads.

    Its input takes no gradients: it learns from the attention, and the model does not learn to
    please it.
    """

    def __init__(self, config: ClsaConfig) -> None:
        super().__init__()
        self.q_proj = nn.Linear(config.hidden_size, config.index_head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.index_head_dim, bias=False)
        self.scale = config.index_head_dim**-0.5

    def forward(self, memory: Tensor, keep: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Index queries [B, kept, d], scaled, and keys [B, Q, d] of [B, Q, hidden]."""
        memory = memory.detach()
        return self.q_proj(memory[:, keep]) * self.scale, self.k_proj(memory)
