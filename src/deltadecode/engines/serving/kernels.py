"""The GPU's part of a decode step: kernels of one layer, planned once for every shape it meets.

Outside of CUDA graphs a step takes as long as Python does. What a step costs is therefore one
look-up a layer, and the launches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltadecode.config import Role
from deltadecode.engines.serving.drafting import LayerPages
from deltadecode.engines.serving.settings import ServingSettings
from deltadecode.engines.serving.step import (
    ForwardPass,
    find_selection,
    keep_selection,
)
from deltadecode.ops import DecodeInputs, Pointer, is_captured, plan_decode

# Keys and values of a layer's cache: [blocks, block_size, Hkv, D] views, last stride 1.
Views = Callable[[Tensor], tuple[Tensor, Tensor]]


class _Planned(NamedTuple):
    """A plan, and where in a layer's cache keys and values begin, in bytes."""

    plan: Any
    k_offset: int
    v_offset: int
    dtype: torch.dtype


class LayerKernels:
    """Kernels of one Δ- or sparse layer.

    Parameters
    ----------
    settings, layer, role
        As in :func:`deltadecode.engines.serving.step.attend`.
    views : callable
        Gives keys and values of the engine's cache.
    scale, sinks, softcap, k_scale, v_scale
        As in :func:`deltadecode.ops.decode_attention`; a float8 q is of numbers over ``q_scale``.
    rows : int
        Most decode rows of a batch; kernels for all numbers of them are compiled at the first step.
    tokens : collection of int
        Numbers of new tokens of a row that have kernels of their own.
    over_all_ranks, score_last, source
        As in :func:`deltadecode.engines.serving.step.attend`.
    """

    def __init__(
        self,
        settings: ServingSettings,
        layer: int,
        role: Role,
        views: Views,
        *,
        scale: float,
        sinks: Tensor | None = None,
        softcap: float | None = None,
        q_scale: float = 1.0,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        rows: int = 0,
        tokens: Collection[int] = (1,),
        over_all_ranks: Callable[[Tensor], Tensor] | None = None,
        score_last: bool = False,
        source: int | None = None,
    ) -> None:
        self._settings, self._layer, self._views = settings, layer, views
        if source is None and role == "sparse":
            source = settings.plan.source(layer)
        self._source = source
        self._scale, self._softcap, self._sinks, self._rows = scale, softcap, sinks, rows
        self._tokens = tokens
        self._q_scale, self._cache_scales = q_scale, (k_scale, v_scale)
        self._over_all_ranks = over_all_ranks if settings.sync_heads else None
        self._score_last = score_last
        # Nobody but drafts reads such a selection, so it can wait for that of other layers.
        self._later = score_last and source is None and self._over_all_ranks is None
        self._ahead = False
        self._planned: dict[Any, _Planned | None] = {}

    def attend(
        self,
        q: Tensor,
        cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        forward: ForwardPass,
        prompts: Tensor | None,
        idle: Tensor | None,
        out: Tensor,
        pages: LayerPages | None = None,
    ) -> bool:
        """Write ``out``, shaped like q; False, and nothing done, where kernels do not compute this.

        ``cache`` is the engine's tensor, ``pages`` what a layer of lossless mode selects for; the
        rest is as in :func:`deltadecode.engines.serving.step.attend`.
        """
        key = (
            q.shape, q.stride(), cache.stride(), block_table.shape, block_table.stride(),
            out.stride(),
        )  # fmt: skip
        if key in self._planned:
            planned = self._planned[key]
        else:
            planned = self._plan(q, cache, block_table, seq_lens, forward, out)
            self._planned[key] = planned
        if planned is None:
            return False
        plan, k_offset, v_offset, dtype = planned
        k_cache: Any
        v_cache: Any
        if cache.is_cuda:
            start = cache.data_ptr()
            k_cache, v_cache = Pointer(start + k_offset, dtype), Pointer(start + v_offset, dtype)
        else:
            k_cache, v_cache = self._views(cache)
        if self._later:
            assert pages is not None
            scores = pages.room(forward, q.shape[0], plan.pages)
            plan.run(
                q, k_cache, v_cache, block_table, seq_lens, self._sinks, out, forward.scratch,
                scores=scores,
            )  # fmt: skip
            pages.select(forward, seq_lens)
        elif self._source is None:
            ids, counts = plan.run(
                q, k_cache, v_cache, block_table, seq_lens, self._sinks, out, forward.scratch
            )
            keep_selection(
                self._settings, forward, self._layer, ids, counts, seq_lens, prompts, idle
            )
        else:
            ids, counts = find_selection(forward, self._layer, self._source)
            plan.run(
                q, k_cache, v_cache, block_table, seq_lens, self._sinks, out, forward.scratch,
                ids, counts,
            )  # fmt: skip
        return True

    def compile_ahead(
        self,
        q: Tensor,
        cache: Tensor,
        longest: int,
        dtype: torch.dtype,
        pages: LayerPages | None = None,
    ) -> None:
        """Compile what steps of sequences of up to ``longest`` tokens will launch; once.

        ``q`` is [at least the most ``tokens``, Hq, D], ``cache`` the engine's tensor, and ``dtype``
        that of the output. ``pages`` is what a layer of lossless mode selects for.
        """
        if self._ahead or is_captured(q):
            return
        self._ahead = True
        block_size = self._views(cache)[0].shape[1]
        table = torch.zeros(1, -(-longest // block_size), dtype=torch.int32, device=q.device)
        seq_lens = torch.zeros(1, dtype=torch.int32, device=q.device)
        config = self._settings.config
        width = table.shape[1] * block_size // config.page_size
        columns = config.table_width(width)
        if self._later and pages is not None:
            pages.compile_ahead(self._rows, width)
        # Rows of one new token, and rows of drafts.
        for new in self._tokens:
            queries = (1, new) if new > 1 else (1,)
            selection = None
            if self._source is not None:
                selection = table.new_zeros((*queries, columns)), table.new_zeros(queries)
            rows = q[: queries[-1]].view(*queries, *q.shape[1:])
            self._plan_decode(rows, cache, table, seq_lens, selection, dtype)

    def _plan(
        self,
        q: Tensor,
        cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        forward: ForwardPass,
        out: Tensor,
    ) -> _Planned | None:
        if not out.is_contiguous():
            return None
        selection = None
        if self._source is not None:
            selection = find_selection(forward, self._layer, self._source)
        plan = self._plan_decode(q, cache, block_table, seq_lens, selection, out.dtype)
        if plan is None:
            return None
        k_cache, v_cache = self._views(cache)
        start = cache.data_ptr()
        return _Planned(plan, k_cache.data_ptr() - start, v_cache.data_ptr() - start, k_cache.dtype)

    def _plan_decode(
        self,
        q: Tensor,
        cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        selection: tuple[Tensor, Tensor] | None,
        dtype: torch.dtype,
    ) -> Any:
        config, scale, q_dtype = self._settings.config, self._scale, None
        ids, counts = selection or (None, None)
        if q.dtype != dtype:  # float8, by which engines multiply float8 keys
            scale, q_dtype = scale * self._q_scale, q.dtype
            q = torch.empty_strided(q.shape, q.stride(), dtype=dtype, device=q.device)
        inputs = DecodeInputs(
            q, *self._views(cache), block_table, seq_lens, scale, config.page_size,
            ids, counts, self._sinks, self._softcap, *self._cache_scales,
            return_page_scores=selection is None, score_last=self._score_last and selection is None,
        )  # fmt: skip
        if selection is not None or self._later:
            return plan_decode(inputs, None, self._rows, q_dtype)
        return plan_decode(inputs, config, self._rows, q_dtype, self._over_all_ranks)
