"""DELTA on CUDA: beside vLLM's FlashAttention backend."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from deltadecode.engines.vllm.builder import DeltaBackend, DeltaBuilder
from deltadecode.engines.vllm.implementation import DeltaImpl


class DeltaFlashBuilder(DeltaBuilder, FlashAttentionMetadataBuilder):
    """Metadata of FlashAttention, and the division of the batch."""


class DeltaFlashImpl(DeltaImpl, FlashAttentionImpl):
    """FlashAttention, and DELTA in decode rows of Δ- and sparse layers."""


class DeltaFlashBackend(DeltaBackend, FlashAttentionBackend):
    """DELTA over the cache of FlashAttention."""

    @staticmethod
    def get_impl_cls() -> type[Any]:
        """Class of the implementation."""
        return DeltaFlashImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """Class of the metadata builder."""
        return DeltaFlashBuilder
