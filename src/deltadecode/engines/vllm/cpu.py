"""DELTA on CPUs: beside vLLM's CPU attention backend, for tests and small models.

vLLM packs keys on CPUs for its matrix instructions, each processor its own way. Caches of planned
layers therefore keep plain keys and values in the same memory, and every row of a layer that reads
one is computed here: the layer itself, or one that shares its cache.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from deltadecode.engines.vllm.builder import DeltaBackend, DeltaBuilder
from deltadecode.engines.vllm.implementation import DeltaImpl

# Query tokens at a time: bounds the logits where they are written out.
_CHUNK = 256


class DeltaCPUBuilder(DeltaBuilder, CPUAttentionMetadataBuilder):
    """Metadata of CPU attention, and the division of the batch."""

    splits: ClassVar[bool] = False


class DeltaCPUImpl(DeltaImpl, CPUAttentionBackendImpl):
    """CPU attention, and our own in layers whose cache is plain."""

    plans: ClassVar[bool] = False
    stock_reads: ClassVar[bool] = False
    _plain: bool | None = None

    def is_ours(self, layer: Any) -> bool:
        """Whether the layer's cache is plain: that of a planned layer."""
        if self._plain is None:
            self.role(layer)  # checks the layer
            owner = getattr(layer, "kv_sharing_target_layer_name", None) or layer.layer_name
            self._plain = self.role_by_name(owner) != "own"
        return self._plain

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write new [tokens, Hkv, D] keys and values to [tokens] slots; negative for none."""
        if not self.is_ours(layer):
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        k_cache, v_cache = self.views(kv_cache)
        kept = slot_mapping >= 0
        slots = slot_mapping[kept]
        block, offset = slots // k_cache.shape[1], slots % k_cache.shape[1]
        tokens = slot_mapping.shape[0]
        key, value = key[:tokens][kept], value[:tokens][kept]
        if self._float8:
            _, k_scale, v_scale = self._scales
            key, value = to_float8(key, k_scale), to_float8(value, v_scale)
        k_cache[block, offset] = key
        v_cache[block, offset] = value

    def attend_others(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
    ) -> None:
        """Full causal attention of the rows that are no decode rows."""
        k_cache, v_cache = self.views(kv_cache)
        _, k_scale, v_scale = self._scales
        starts = attn_metadata.query_start_loc.tolist()
        lengths = attn_metadata.seq_lens.tolist()
        for row in range(attn_metadata.delta.decode, len(lengths)):
            tokens = lengths[row]
            blocks = attn_metadata.block_table[row, : -(-tokens // k_cache.shape[1])]
            keys, values = (
                cache.index_select(0, blocks).flatten(0, 1)[:tokens].to(query.dtype)
                for cache in (k_cache, v_cache)
            )
            span = slice(starts[row], starts[row + 1])
            out = causal(
                query[span], keys, values, self.scale * k_scale, self.sinks,
                self.logits_soft_cap or None,
            )  # fmt: skip
            output[span] = out * v_scale


def to_float8(numbers: Tensor, scale: float) -> Tensor:
    """Numbers over ``scale`` as the nearest float8; what is too large becomes the largest."""
    most = torch.finfo(torch.float8_e4m3fn).max
    return (numbers / scale).clamp(-most, most).to(torch.float8_e4m3fn)


def causal(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Attention of the last tokens of a sequence to those before them and themselves.

    ``q`` is [m, Hq, D], the last m of n tokens; ``keys`` and ``values`` are [n, Hkv, D]. The rest
    is as in :func:`deltadecode.ops.decode_attention`. Returns [m, Hq, D].
    """
    new, tokens = q.shape[0], keys.shape[0]
    group = q.shape[1] // keys.shape[1]
    keys, values = (
        cache.repeat_interleave(group, dim=1).transpose(0, 1) for cache in (keys, values)
    )
    parts = []
    for first in range(0, new, _CHUNK):
        part = q[first : first + _CHUNK].transpose(0, 1)
        last = tokens - new + first + torch.arange(part.shape[1])
        seen = torch.arange(tokens) <= last[:, None]
        if sinks is None and softcap is None:
            inputs = part, keys, values
            if q.dtype == torch.float32:
                # With rows, one of them here, PyTorch takes a kernel that is three times as fast.
                # Of half precision it rounds the weights, too, which turns tokens.
                inputs = part[None], keys[None], values[None]
            out = scaled_dot_product_attention(*inputs, attn_mask=seen, scale=scale)
            out = out.reshape(part.shape)
        else:
            out = _written_out(part, keys, values, seen, scale, sinks, softcap)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


def _written_out(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    logits = (q.float() @ keys.float().transpose(1, 2)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        sink = sinks.float()[:, None, None].expand(-1, logits.shape[1], 1)
        logits = torch.cat([logits, sink], dim=-1)
    weights = logits.softmax(-1)[..., : keys.shape[1]]
    return (weights @ values.float()).to(q.dtype)


class DeltaCPUBackend(DeltaBackend, CPUAttentionBackend):
    """DELTA over the cache of CPU attention."""

    @staticmethod
    def get_impl_cls() -> type[Any]:
        """Class of the implementation."""
        return DeltaCPUImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """Class of the metadata builder."""
        return DeltaCPUBuilder
