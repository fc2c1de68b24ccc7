"""What our backends add to a stock one: the implementation of attention."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index

from deltadecode.config import Role
from deltadecode.engines.serving.drafting import DraftPages, LayerPages
from deltadecode.engines.serving.kernels import LayerKernels
from deltadecode.engines.serving.rows import Rows, narrow_table
from deltadecode.engines.serving.step import Cache, ForwardPass, attend
from deltadecode.engines.vllm import versions
from deltadecode.engines.vllm.builder import most_rows
from deltadecode.engines.vllm.checks import FLOAT8_DTYPES
from deltadecode.engines.vllm.metadata import DraftPass
from deltadecode.engines.vllm.ranks import over_all_ranks
from deltadecode.errors import UnsupportedCacheError, UnsupportedModelError
from deltadecode.ops import is_captured
from deltadecode_vllm import is_lossless

# Where a forward pass's own things are kept, in vLLM's context of it.
_FORWARD = "deltadecode"


class DeltaImpl:
    """Beside a stock implementation: decode rows of Δ- and sparse layers."""

    # Whether decode rows go to planned kernels where these can compute them.
    plans: ClassVar[bool] = True
    # Whether the stock implementation reads the caches of planned layers.
    stock_reads: ClassVar[bool] = True
    _float8 = _lossless = False
    # What a layer's verifications select, in lossless mode.
    _pages: LayerPages | None = None
    # What float8 queries, keys and values are to be multiplied by.
    _scales = (1.0, 1.0, 1.0)
    head_size: int
    kv_cache_dtype: str
    scale: float
    logits_soft_cap: float
    sinks: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        self._longest = config.model_config.max_model_len
        self.settings = versions.settings_of(config).within(self._longest)
        self._most_rows, self._numbers = most_rows(config), versions.numbers_of_tokens(config)
        self._dtype_bytes = config.model_config.dtype.itemsize
        self._float8 = self.kv_cache_dtype in FLOAT8_DTYPES
        self._lossless = is_lossless(config)
        self._place = self._number = 0
        self._role: Role | None = None
        self._kernels: dict[bool, LayerKernels] = {}

    def role(self, layer: Any) -> Role:
        """Role of the layer that this implementation belongs to.

        Layers of a draft model are ``"own"``. Raises UnsupportedModelError when a planned layer
        turns out to have a sliding window or position biases.
        """
        if self._role is None:
            self._number = extract_layer_index(layer.layer_name)
            role = self.role_by_name(layer.layer_name)
            if role != "own" and self._is_special():
                raise UnsupportedModelError(
                    f"layer {self._number} has a sliding window or ALiBi, and DELTA plans "
                    f"full-attention layers only"
                )
            if self._float8 and role != "own":
                self._scales = read_scales(layer)
            self._role = role
        return self._role

    @property
    def cache_bytes(self) -> int:
        """Bytes of a number in the layer's cache."""
        return 1 if self._float8 else self._dtype_bytes

    def views(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the layer's cache; see :func:`versions.key_value_views`."""
        return versions.key_value_views(kv_cache, self.head_size, self._float8)

    def role_by_name(self, layer_name: str) -> Role:
        """Role of a layer; those of a draft model come after the model's or are named so."""
        number, plan = extract_layer_index(layer_name), self.settings.plan
        draft = layer_name.startswith("draft") or number >= plan.num_layers
        if draft:
            return "own"
        role = plan.role(number)
        # Then every layer that drafts selects pages of its own.
        return "delta" if self._lossless and role != "own" else role

    def drafts_from(self, pages: DraftPages, place: int) -> None:
        """Keep what verifications select, and draft from it: as layer ``place`` of ``pages``."""
        self._pages, self._place = pages.layer(place), place

    def _is_special(self) -> bool:
        # FlashAttention has (tokens before, tokens after); on CPUs it is the window or -1.
        window = getattr(self, "sliding_window", None)
        before = window[0] if isinstance(window, tuple) else (window or 0) - 1
        hides = 0 <= before < self._longest - 1
        return hides or getattr(self, "alibi_slopes", None) is not None

    def is_ours(self, layer: Any) -> bool:
        """Whether decode rows of the layer are computed here, and not by the stock backend."""
        return self.role(layer) in ("delta", "sparse")

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
        """Attention of one layer for a batch, after the new tokens are in the cache.

        ``query``, ``key`` and ``value`` are [tokens, heads, D], ``output`` likewise.
        ``attn_metadata`` is what :class:`DeltaBuilder` made; None in a profiling run.
        """
        if isinstance(attn_metadata, DraftPass):
            self._attend_draft(layer, query, kv_cache, attn_metadata, output)
            return output
        rows: Rows | None = getattr(attn_metadata, "delta", None)
        stock = super().forward  # type: ignore[misc]
        if rows is None or not self.is_ours(layer) or self._all_short(query, attn_metadata):
            if attn_metadata is None and kv_cache.is_cuda and kv_cache.numel():
                self._compile_ahead(layer, query, kv_cache, output.dtype)
            stock(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            return output
        if rows.decode:
            self.attend_decode_rows(layer, query, kv_cache, attn_metadata, output)
        if rows.others:
            self.attend_others(layer, query, key, value, kv_cache, attn_metadata, output)
        return output

    def _all_short(self, query: Tensor, attn_metadata: Any) -> bool:
        """Whether every row reads everything, which stock attention does cheaper.

        By ``min_tokens``; or in lossless mode, with no drafts to verify: the first ones behind it
        take the newest pages. vLLM's ``max_seq_len`` is on the CPU, and never less than the longest
        row. A graph being captured is replayed for longer rows too, so it has no such branch.
        """
        if not self.stock_reads:
            return False
        if self._lossless and attn_metadata.delta.tokens == 1:
            return True
        short: bool = attn_metadata.max_seq_len < self.settings.min_tokens
        return short and not is_captured(query)

    def attend_decode_rows(
        self, layer: Any, query: Tensor, kv_cache: Tensor, attn_metadata: Any, output: Tensor
    ) -> None:
        """Attention of the decode rows; arguments as in :meth:`forward`."""
        rows: Rows = attn_metadata.delta
        table, lengths = rows.block_table, rows.seq_lens
        if table is None or lengths is None:
            table, lengths = self._keep_tables(rows, kv_cache, attn_metadata)
        context = vars(get_forward_context())
        forward: ForwardPass | None = context.get(_FORWARD)
        if forward is None:
            forward = context[_FORWARD] = ForwardPass()
        drafts, size = rows.drafts, lengths.shape[0]
        if drafts is None:
            q, out = _by_row(query, rows, size), _by_row(output, rows, size)
        else:
            q = _by_row(query[drafts.queries], rows, size)
            out = torch.empty_like(q, dtype=output.dtype)
        # The last token of a row is never idle.
        idle = None if drafts is None or self._lossless else drafts.idle
        prompts = rows.prompts
        if not rows.flagged and not is_captured(q):
            prompts = None
        self._attend(layer, q, kv_cache, table, lengths, forward, prompts, idle, out)
        if self._pages is not None and self._number in forward.selections:
            self._pages.keep(forward, forward.selections[self._number][0], lengths)
        if drafts is not None:
            output[: rows.decode_tokens] = out.flatten(0, 1)[drafts.places]

    def _keep_tables(
        self, rows: Rows, kv_cache: Tensor, attn_metadata: Any
    ) -> tuple[Tensor, Tensor]:
        """Block table and lengths of the decode rows, for every layer of the step."""
        count, k_cache = rows.decode, self.views(kv_cache)[0]
        table, lengths = attn_metadata.block_table[:count], attn_metadata.seq_lens[:count]
        table = narrow_table(table, k_cache.shape[1], attn_metadata.max_seq_len)
        rows.block_table, rows.seq_lens = table, lengths
        return table, lengths

    def _attend_draft(
        self, layer: Any, query: Tensor, kv_cache: Tensor, draft: DraftPass, output: Tensor
    ) -> None:
        """Attention of one new token of each row to the pages of this layer."""
        count = len(draft.seq_lens)
        pages, q, out = draft.pages, query[:count], output[:count]
        ids, counts = pages.ids[self._place, :count], pages.counts[self._place, :count]
        forward = ForwardPass({self._number: (ids, counts)}, draft.scratch)
        self._attend(
            layer, q, kv_cache, draft.block_table, draft.seq_lens, forward, None, None, out, True
        )

    def _attend(
        self,
        layer: Any,
        q: Tensor,
        kv_cache: Tensor,
        table: Tensor,
        lengths: Tensor,
        forward: ForwardPass,
        prompts: Tensor | None,
        idle: Tensor | None,
        out: Tensor,
        drafts: bool = False,
    ) -> None:
        """Write ``out``, shaped like q; ``drafts`` read pages under the layer's own number."""
        if self.plans and self._layer_kernels(layer, drafts).attend(
            q, kv_cache, table, lengths, forward, prompts, idle, out, self._pages
        ):
            return
        q_scale, k_scale, v_scale = self._scales
        if q.dtype == out.dtype:
            q_scale = 1.0
        attended = attend(
            self.settings,
            self._number,
            "sparse" if drafts else self.role(layer),
            q.to(out.dtype),
            Cache(*self.views(kv_cache), table, lengths),
            forward,
            scale=self.scale * q_scale,
            sinks=self.sinks,
            softcap=self.logits_soft_cap or None,
            k_scale=k_scale,
            v_scale=v_scale,
            prompts=prompts,
            idle=idle,
            over_all_ranks=over_all_ranks(),
            score_last=self._lossless,
            source=self._number if drafts else None,
        )
        out.copy_(attended)

    def _layer_kernels(self, layer: Any, drafts: bool = False) -> LayerKernels:
        if drafts not in self._kernels:
            q_scale, k_scale, v_scale = self._scales
            self._kernels[drafts] = LayerKernels(
                self.settings,
                self._number,
                "sparse" if drafts else self.role(layer),
                self.views,
                scale=self.scale,
                sinks=self.sinks,
                softcap=self.logits_soft_cap or None,
                q_scale=q_scale,
                k_scale=k_scale,
                v_scale=v_scale,
                rows=self._most_rows,
                tokens=self._numbers,
                over_all_ranks=over_all_ranks(),
                score_last=self._lossless,
                source=self._number if drafts else None,
            )
        return self._kernels[drafts]

    def _compile_ahead(
        self, layer: Any, query: Tensor, kv_cache: Tensor, dtype: torch.dtype
    ) -> None:
        """Compile in a run without a batch, of which vLLM has one before the first request."""
        if self.is_ours(layer) and query.shape[0] >= self._numbers[-1]:
            kernels = self._layer_kernels(layer)
            kernels.compile_ahead(query, kv_cache, self._longest, dtype, self._pages)

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
        """Stock attention of the other rows; arguments as in :meth:`forward`."""
        first, metadata = attn_metadata.delta.decode_tokens, attn_metadata.delta.prefill
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


def read_scales(layer: Any) -> tuple[float, float, float]:
    """Scales of a layer's queries, keys and values, read once: the device is asked for them.

    Raises UnsupportedCacheError where heads have scales of their own.
    """
    scales = layer._q_scale, layer._k_scale, layer._v_scale
    if any(scale.numel() != 1 for scale in scales):
        raise UnsupportedCacheError(
            f"{layer.layer_name} has a float8 scale for each head, and DELTA takes one for all"
        )
    q_scale, k_scale, v_scale = (float(scale) for scale in scales)
    return q_scale, k_scale, v_scale


def _by_row(tokens: Tensor, rows: Rows, count: int) -> Tensor:
    """Of ``count`` decode rows: [tokens, Hq, D] to [count, Hq, D], or [count, Q, Hq, D]."""
    size = count * rows.tokens
    if size != tokens.shape[0]:
        tokens = tokens[:size]
    return tokens if rows.tokens == 1 else tokens.unflatten(0, (count, rows.tokens))
