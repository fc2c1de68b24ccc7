"""What one layer of a decode step launches, planned for a kind and run as often as it comes."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.ops.memory import HasAddress, Pointer, Scratch
from deltadecode.ops.triton.launch import padded
from deltadecode.ops.triton.plans import (
    AttentionKind,
    attention_plan,
    selection_kind,
    selection_plan,
)

# Of Triton 3.5 and later.
AsyncCompileMode = getattr(triton, "AsyncCompileMode", None)
# Threads that compile.
_COMPILERS = 8


class DecodePlan:
    """Attention of one layer and, of a Δ-layer, its selection; see :func:`plan_decode`.

    ``cfg`` is given for a layer that selects, whose ``kind`` has page scores: of pages of one token
    where scores ``over_all_ranks`` come first. Without ``cfg`` a kind with scores writes them where
    :meth:`run` is told to.

    Attributes
    ----------
    pages : int
        Page scores of a query.
    """

    def __init__(
        self,
        kind: AttentionKind,
        cfg: DeltaConfig | None,
        over_all_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._attention = attention_plan(kind)
        self.pages = kind.pages
        self._over_all_ranks = over_all_ranks
        self._selection = None
        if cfg is not None:
            self._page_size = cfg.page_size
            pages = kind.reach // cfg.page_size
            scored = selection_kind(cfg, kind.scored_queries, pages, torch.float32, pages)
            self._selection = selection_plan(scored)
            self._scores = math.prod(kind.scored_queries) * kind.pages
        else:
            self._scores = 0

    def run(
        self,
        q: Tensor,
        k_cache: HasAddress,
        v_cache: HasAddress,
        block_table: Tensor,
        seq_lens: Tensor,
        sinks: Tensor | None,
        out: Tensor,
        scratch: Scratch,
        page_ids: Tensor | None = None,
        page_counts: Tensor | None = None,
        scores: HasAddress | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Write ``out`` [..., Hq, D]; a layer that selects returns page ids and counts.

        ``scores`` [..., pages], contiguous float32, is for a plan that has them and does not
        select. Everything is as it was in the inputs of the plan, but for addresses and values;
        nothing is checked.
        """
        floats = self._attention.floats
        memory = scratch.floats(floats + self._scores, q)
        if self._selection is not None:
            if memory.is_cuda:
                scores = Pointer(memory.data_ptr() + 4 * floats, torch.float32)
            else:
                scores = memory[floats : floats + self._scores]
        self._attention.run(
            q,
            k_cache,
            v_cache,
            block_table,
            seq_lens,
            page_ids,
            page_counts,
            sinks,
            out,
            scores,
            memory,
        )
        if self._selection is None or scores is None:
            return None
        if self._over_all_ranks is not None:
            token_scores = self._over_all_ranks(memory[floats : floats + self._scores])
            scores = token_scores.view(-1, self._page_size).sum(-1)
        return self._selection.run(scores, seq_lens)

    def compile(self) -> None:
        """Compile every kernel, if it is not."""
        self._attention.compile()
        if self._selection is not None:
            self._selection.compile()


# Kinds that have been compiled for every number of rows; strides aside, of which a model has some
# before the first request and the same later.
_compiled: set[tuple[object, ...]] = set()


def compile_ahead(kind: AttentionKind, cfg: DeltaConfig | None, rows: int) -> None:
    """Compile a kind for 1 to ``rows`` rows, so that nothing compiles while a request waits."""
    known = (
        kind._replace(
            queries=kind.queries[1:], q_strides=(0,) * 3, k_strides=(0,) * 3, v_strides=(0,) * 3,
            table_row=0,
        ),
        cfg, rows,
    )  # fmt: skip
    if known in _compiled or torch.cuda.is_current_stream_capturing():
        return
    _compiled.add(known)
    plans = [
        DecodePlan(kind._replace(queries=(count, *kind.queries[1:])), cfg)
        for count in sorted({padded(count) for count in range(1, rows + 1)})
    ]
    if AsyncCompileMode is not None:
        # Only compiles, in several threads; what follows loads what it has compiled.
        with ThreadPoolExecutor(_COMPILERS) as threads, AsyncCompileMode(threads):
            for plan in plans:
                plan.compile()
    for plan in plans:
        plan.compile()
