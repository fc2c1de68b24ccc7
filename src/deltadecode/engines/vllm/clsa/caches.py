"""What the cross-decoder shares, in vLLM's paged memory: keys and values, and index keys.

Each is a layer without a computation, as vLLM gives memory to layers: one vector a token, blocks
[blocks, block_size, size]. vLLM gives them block tables of their own, since a block of index keys
holds more tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from deltadecode.engines.serving.rows import narrow_table


@dataclass
class CacheMetadata:
    """Where the tokens of a batch lie in one cache.

    Attributes
    ----------
    block_table, lengths
        [B, blocks] and [B] int32: blocks and tokens of the rows, the new ones included.
    slots
        [T] int64, where the new tokens go; negative for padding.
    starts
        [B + 1] int32, first new token of each row.
    tokens
        New tokens of all rows.
    most, longest
        Most new tokens of a row, and an upper bound of its length; known without the device.
    """

    block_table: Tensor
    lengths: Tensor
    slots: Tensor
    starts: Tensor
    tokens: int
    most: int
    longest: int


class CacheBuilder(AttentionMetadataBuilder[CacheMetadata]):
    """Makes the metadata of a batch; decode batches of one token a row go into CUDA graphs."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # abstract in vLLM, though there is nothing to add

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: Any,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> CacheMetadata:
        """Metadata of the batch, on the device only."""
        common = common_attn_metadata
        rows = common.num_reqs
        return CacheMetadata(
            common.block_table_tensor[:rows],
            common.seq_lens[:rows],
            common.slot_mapping,
            common.query_start_loc[: rows + 1],
            common.num_actual_tokens,
            common.max_query_len,
            common.max_seq_len,
        )


class CacheBackend(AttentionBackend):
    """The backend of a layer that only keeps tokens."""

    @staticmethod
    def get_name() -> str:
        """Name in vLLM's messages."""
        return "CLSA"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        """Refuse: nothing attends by this backend."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[CacheBuilder]:
        """Class of the metadata builder."""
        return CacheBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(*args: Any) -> list[Any]:
        """All."""
        return [MultipleOf(1)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, *args: Any, **kw: Any
    ) -> tuple[int, ...]:
        """Shape of the cache, which vLLM 0.24 asks for."""
        return (num_blocks, block_size, head_size)


class TokenCache(nn.Module, AttentionLayerBase):
    """One vector a token, in blocks that vLLM gives out.

    Parameters
    ----------
    size
        Numbers of a vector.
    name
        The layer's name for vLLM, with a layer's number in it.
    """

    def __init__(self, size: int, name: str) -> None:
        super().__init__()
        config = get_current_vllm_config()
        self.size, self.layer_name = size, name
        self.dtype = config.model_config.dtype
        self.kv_cache = torch.tensor([])
        context = config.compilation_config.static_forward_context
        if name in context:
            raise ValueError(f"Duplicate layer name: {name}")
        context[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Class of the backend."""
        return CacheBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> MLAAttentionSpec:
        """What vLLM is to keep of a token."""
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.size,
            dtype=self.dtype,
        )

    @property
    def blocks(self) -> Tensor:
        """[blocks, block_size, size]; vLLM 0.32 has a dimension of one head behind the first."""
        cache = self.kv_cache
        return cache.squeeze(1) if cache.dim() == 4 else cache

    def metadata(self) -> CacheMetadata | None:
        """Metadata of this batch; None in a run without one."""
        found = get_forward_context().attn_metadata
        return None if found is None else found[self.layer_name]

    def write(self, new: Tensor) -> None:
        """Keep the new tokens' vectors [T, size]."""
        metadata = self.metadata()
        if metadata is None:
            return
        blocks = self.blocks
        # Padding goes into block 0, which vLLM gives to no row.
        slots = metadata.slots[: new.shape[0]].clamp(min=0)
        block_size = blocks.shape[1]
        blocks[slots // block_size, slots % block_size] = new[: slots.shape[0]]

    def table(self, metadata: CacheMetadata) -> Tensor:
        """Block table of the batch."""
        return narrow_table(metadata.block_table, self.blocks.shape[1], metadata.longest)
