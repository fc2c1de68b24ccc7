"""What our backends add to a stock one: builder and implementation, for every platform."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport, MultipleOf

from deltadecode.config import Role
from deltadecode.engines.vllm import versions
from deltadecode.engines.vllm.checks import CACHE_DTYPES
from deltadecode.engines.vllm.settings import BACKEND, KEY, Settings, resolve
from deltadecode.engines.vllm.step import (
    Cache,
    PromptRows,
    Rows,
    attend,
    count_decode_rows,
    most_rows,
    narrow_table,
    pad_rows,
)
from deltadecode.errors import DeltaDecodeError, UnsupportedModelError


def settings_of(vllm_config: Any) -> Settings:
    """Settings of an engine.

    Parameters
    ----------
    vllm_config : vllm.config.VllmConfig
        Of the engine.

    Returns
    -------
    Settings
    """
    given = vllm_config.additional_config
    return resolve(
        given.get(KEY) if isinstance(given, dict) else None, vllm_config.model_config.hf_config
    )


class DeltaBackend:
    """Beside a stock backend: what it must not be asked for, and what blocks must divide into."""

    @staticmethod
    def get_name() -> str:
        """Name that vLLM looks this backend up by.

        Returns
        -------
        str
        """
        return BACKEND

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        """Whether keys and values may be stored in a type: those of models only.

        Parameters
        ----------
        kv_cache_dtype : str or None
            As vLLM names it.

        Returns
        -------
        bool
        """
        return kv_cache_dtype in (None, *CACHE_DTYPES)

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
        """Those of the stock backend that hold whole pages.

        Parameters
        ----------
        *args
            The specification of the cache, from 0.32 on.

        Returns
        -------
        list
        """
        sizes: list[Any] = super().get_supported_kernel_block_sizes(*args)  # type: ignore[misc]
        config = get_current_vllm_config_or_none()
        if config is None or config.model_config is None:
            return sizes
        try:
            page = settings_of(config).config.page_size
        except DeltaDecodeError:
            return sizes  # told in full once the configuration is complete (plugin.prepare)
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
        # vLLM then puts the rows of one new token first.
        self._init_reorder_batch_threshold(1)  # type: ignore[attr-defined]
        config, device = self.vllm_config, self.device  # type: ignore[attr-defined]
        self._prompts = PromptRows(most_rows(config), device)
        # Which rows of the batch to come belong to prompts, where its metadata may not say so.
        self.told: Any = None
        versions.tell_builders_of_prompts(config)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Uniform batches at most: a graph holds decode rows or stock rows, never both.

        Parameters
        ----------
        vllm_config, kv_cache_spec
            Of the engine and the layers.

        Returns
        -------
        AttentionCGSupport
        """
        stock: AttentionCGSupport = super().get_cudagraph_support(  # type: ignore[misc]
            vllm_config, kv_cache_spec
        )
        return min(stock, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Whether rows share the attention of a common prefix: no, each row selects alone.

        Returns
        -------
        bool
        """
        return False

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: Any,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Stock metadata of the batch, with ``delta``: its :class:`~step.Rows`.

        Parameters
        ----------
        common_prefix_len, common_attn_metadata, fast_build
            As vLLM passes them.
        **kwargs
            What other versions add.

        Returns
        -------
        AttentionMetadata
        """
        stock = super().build  # type: ignore[misc]
        metadata = stock(0, common_attn_metadata, fast_build, **kwargs)
        rows = Rows(count_decode_rows(common_attn_metadata))
        told, self.told = self.told, None
        rows.prompts = self._prompts.update(common_attn_metadata, rows.decode, told)
        if self.splits and 0 < rows.decode < common_attn_metadata.num_reqs:
            # The builder may keep its schedule in one buffer, which the second build overwrites.
            schedule = getattr(metadata, "scheduler_metadata", None)
            if isinstance(schedule, Tensor):
                metadata.scheduler_metadata = schedule.clone()
            rest = versions.rows_after(common_attn_metadata, rows.decode)
            rows.prefill = stock(0, rest, fast_build, **kwargs)
            pad_rows(rows, metadata)
        metadata.delta = rows
        return metadata


class DeltaImpl:
    """Beside a stock implementation: decode rows of Δ- and sparse layers."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    logits_soft_cap: float
    sinks: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings_of(get_current_vllm_config())
        self._number: int | None = None
        self._role: Role | None = None

    def role(self, layer: Any) -> Role:
        """Role of a layer in the plan.

        Parameters
        ----------
        layer : vllm.attention.Attention
            The layer that this implementation belongs to.

        Returns
        -------
        str
            ``"own"`` for the layers of a draft model, which come after the model's or are named so.

        Raises
        ------
        UnsupportedModelError
            When a planned layer turns out to have a sliding window or position biases.
        """
        if self._role is None:
            self._number = number = extract_layer_index(layer.layer_name)
            plan = self.settings.plan
            draft = layer.layer_name.startswith("draft") or number >= plan.num_layers
            role: Role = "own" if draft else plan.role(number)
            if role != "own" and self._is_special():
                raise UnsupportedModelError(
                    f"layer {number} has a sliding window or ALiBi, and DELTA plans "
                    f"full-attention layers only"
                )
            self._role = role
        return self._role

    def _is_special(self) -> bool:
        window = getattr(self, "sliding_window", None)
        windowed = window not in (None, -1, (-1, -1))
        return windowed or getattr(self, "alibi_slopes", None) is not None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attention of one layer for a batch.

        Parameters
        ----------
        layer
            The layer.
        query, key, value : Tensor
            [tokens, heads, D].
        kv_cache : Tensor
            Of the layer, the new tokens written.
        attn_metadata
            What :class:`DeltaBuilder` made; None in a profiling run.
        output : Tensor
            [tokens, Hq, D], written to.
        *args, **kwargs
            What vLLM passes on.

        Returns
        -------
        Tensor
            ``output``.
        """
        rows: Rows | None = getattr(attn_metadata, "delta", None)
        stock = super().forward  # type: ignore[misc]
        if rows is None or self.role(layer) not in ("delta", "sparse"):
            stock(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            return output
        count = rows.decode
        if count < attn_metadata.seq_lens.shape[0]:
            self.attend_others(layer, query, key, value, kv_cache, attn_metadata, output)
        if count:
            self.attend_decode_rows(query, kv_cache, attn_metadata, output)
        return output

    def attend_decode_rows(
        self, query: Tensor, kv_cache: Tensor, attn_metadata: Any, output: Tensor
    ) -> None:
        """Δ- or sparse attention of the decode rows.

        Parameters
        ----------
        query, kv_cache, attn_metadata, output
            See :meth:`forward`.
        """
        rows: Rows = attn_metadata.delta
        count = rows.decode
        table, lengths = rows.block_table, rows.seq_lens
        if table is None or lengths is None:
            table, lengths = attn_metadata.block_table[:count], attn_metadata.seq_lens[:count]
        k_cache, v_cache = versions.key_value_views(kv_cache, self.head_size)
        table = narrow_table(table, k_cache.shape[1], attn_metadata.max_seq_len)
        assert self._number is not None
        out = attend(
            self.settings,
            self._number,
            # Tokens of other rows stand in for those of padding rows: nothing is attended to.
            query[: lengths.shape[0]],
            Cache(k_cache, v_cache, table, lengths),
            rows.prompts,
            scale=self.scale,
            sinks=self.sinks,
            softcap=self.logits_soft_cap or None,
        )
        output[:count] = out[:count]

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
        """Stock attention of the rows that are no decode rows.

        Parameters
        ----------
        layer, query, key, value, kv_cache, attn_metadata, output
            See :meth:`forward`.
        """
        first, metadata = attn_metadata.delta.decode, attn_metadata.delta.prefill
        if metadata is None:
            first, metadata = 0, attn_metadata
        super().forward(  # type: ignore[misc]
            layer,
            query[first:],
            None if key is None else key[first:],
            None if value is None else value[first:],
            kv_cache,
            metadata,
            output[first:],
        )
