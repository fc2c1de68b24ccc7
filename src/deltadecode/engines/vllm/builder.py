"""What our backends add to a stock one: the backend's facts, and the builder of metadata."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar

from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionCGSupport, MultipleOf

from deltadecode.engines.serving.rows import PromptRows, divide
from deltadecode.engines.vllm import BACKEND, versions
from deltadecode.engines.vllm.checks import CACHE_DTYPES
from deltadecode.errors import DeltaDecodeError
from deltadecode_vllm import is_lossless, wrap_once


class DeltaBackend:
    """Beside a stock backend: what it must not be asked for, and what blocks must divide into."""

    @staticmethod
    def get_name() -> str:
        """Name that vLLM looks this backend up by."""
        return BACKEND

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        """Whether keys and values may be stored in a type: where the stock backend can, too."""
        stock: bool = super().supports_kv_cache_dtype(kv_cache_dtype)  # type: ignore[misc]
        return stock and kv_cache_dtype in (None, *CACHE_DTYPES)

    # The batch is divided on the CPU, by lengths that must be those of the device.
    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Whether the device may cut query lengths that the CPU has planned: no."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """Whether decode rows may have a window of their own: no."""
        return False

    @classmethod
    def supports_dcp(cls) -> bool:
        """Whether a sequence may be spread over ranks: no."""
        return False

    @classmethod
    def supports_pcp(cls) -> bool:
        """Whether a prompt may be spread over ranks: no."""
        return False

    @classmethod
    def get_supported_kernel_block_sizes(cls, *args: Any) -> list[Any]:
        """Those of the stock backend that hold whole pages."""
        sizes: list[Any] = super().get_supported_kernel_block_sizes(*args)  # type: ignore[misc]
        config = get_current_vllm_config_or_none()
        if config is None or config.model_config is None:
            return sizes
        try:
            page = versions.settings_of(config).config.page_size
        except DeltaDecodeError:
            return sizes  # refused once the configuration is complete (plugin.py)
        wholes = [
            MultipleOf(math.lcm(size.base, page)) if isinstance(size, MultipleOf) else size
            for size in sizes
        ]
        return [size for size in wholes if isinstance(size, MultipleOf) or size % page == 0]


class DeltaBuilder:
    """Beside a stock metadata builder: divides the batch into decode rows and the others."""

    supports_update_block_table: bool = False
    # Whether the other rows of a mixed batch need stock metadata of their own.
    splits: ClassVar[bool] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.vllm_config  # type: ignore[attr-defined]
        self._most_tokens, self._lossless = versions.most_tokens(config), is_lossless(config)
        self._numbers = versions.numbers_of_tokens(config)
        # vLLM then puts the rows of no more new tokens first.
        self._init_reorder_batch_threshold(self._most_tokens)  # type: ignore[attr-defined]
        reorder_mixed_batches_only()
        self._prompts = PromptRows(most_rows(config), self.device)  # type: ignore[attr-defined]
        # Which rows of the next batch belong to prompts, where its metadata may not say so.
        self.prefilling: Tensor | None = None
        versions.pass_prompts_to_builders(config)
        layers = config.compilation_config.static_forward_context
        for name in self.layer_names:  # type: ignore[attr-defined]
            layers[name].impl.role(layers[name])  # raises at the start, not in a forward pass

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Uniform batches at most: a graph holds decode rows or stock rows, never both."""
        stock: AttentionCGSupport = super().get_cudagraph_support(  # type: ignore[misc]
            vllm_config, kv_cache_spec
        )
        return min(stock, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Whether rows share the attention of a common prefix: no, each row selects alone."""
        return False

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: Any,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Stock metadata of the batch, with ``delta``: its :class:`Rows`."""
        stock = super().build  # type: ignore[misc]
        common = common_attn_metadata
        metadata = stock(0, common, fast_build, **kwargs)
        rows = divide(
            common.query_start_loc_cpu,
            common.num_reqs,
            common.num_actual_tokens,
            common.max_query_len,
            self._most_tokens,
            self.device,  # type: ignore[attr-defined]
            self._numbers,
        )
        prefilling, self.prefilling = self.prefilling, None
        if prefilling is None:
            prefilling = getattr(common, "is_prefilling", None)
        rows.prompts = self._prompts.update(prefilling, rows.decode)
        rows.flagged = self._prompts.any
        rows.others = rows.decode < common.num_reqs
        # In lossless mode rows of one token are the stock backend's, like the others.
        alone = self._lossless and rows.tokens == 1
        if self.splits and not alone and 0 < rows.decode < common.num_reqs:
            # The builder may keep its schedule in one buffer, which the second build overwrites.
            schedule = getattr(metadata, "scheduler_metadata", None)
            if isinstance(schedule, Tensor):
                metadata.scheduler_metadata = schedule.clone()
            rows.prefill = stock(0, versions.rows_after(common, rows.decode), fast_build, **kwargs)
        metadata.delta = rows
        return metadata


def reorder_mixed_batches_only() -> None:
    """Let vLLM's runner leave batches of nothing but decode rows as they are.

    It sorts the rows of every batch, which is a good part of what a step of many rows costs on the
    host. Only a batch with other rows needs that, or one whose layers are not all ours.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if hasattr(GPUModelRunner, "_may_reorder_batch"):
        wrap_once(GPUModelRunner, "_may_reorder_batch", _reorder_mixed)


def _reorder_mixed(reorder: Callable[..., None]) -> Any:
    def _may_reorder_batch(self: Any, scheduler_output: Any) -> None:
        threshold = self.reorder_batch_threshold
        if threshold is None or _any_longer(scheduler_output, threshold) or not _is_ours(self):
            reorder(self, scheduler_output)

    return _may_reorder_batch


def _any_longer(step: Any, threshold: int) -> bool:
    """Whether a row has more new tokens."""
    new_tokens = step.num_scheduled_tokens
    one_each = step.total_num_scheduled_tokens == len(new_tokens)
    return not one_each and max(new_tokens.values()) > threshold


def _is_ours(runner: Any) -> bool:
    for group in chain.from_iterable(runner.attn_groups):
        builder = group.get_metadata_builder()
        if not (builder.reorder_batch_threshold is None or isinstance(builder, DeltaBuilder)):
            return False
    return True


def most_rows(vllm_config: Any) -> int:
    """Most decode rows of a batch, padding rows included."""
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(int(vllm_config.scheduler_config.max_num_seqs), int(captured))
