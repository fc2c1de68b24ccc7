"""Kernels of decode steps on a GPU, planned once for tensors of one kind.

Such a step takes as long as Python does. The operations check their inputs and look their plan up
at every call; here both happen once for a kind of tensors, which all layers of a role share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.ops import DecodeInputs, Scratch, decode_attention, plan_decode, select_pages

# A growing cache has a kind of its own at every page. Then it does not come again.
_MOST = 256


class PlannedKernels:
    """What the layers of one model have launched, by the kind of their tensors.

    All its Δ-layers select by one configuration.
    """

    def __init__(self) -> None:
        self._plans: dict[Any, Any] = {}

    def attend(
        self,
        scratch: Scratch,
        query: Tensor,
        inputs: dict[str, Any],
        options: dict[str, Any],
        pages: tuple[Tensor, Tensor] | None = None,
        select: DeltaConfig | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Output [B, Hq, D] of :func:`deltadecode.ops.decode_attention`, and a Δ-layer's selection.

        Parameters
        ----------
        scratch : Scratch
            Of the step.
        query : Tensor
            [B, Hq, D].
        inputs, options : dict
            Tensors and numbers of the operation, by name.
        pages : tuple of Tensor, optional
            Page ids and counts of a sparse layer.
        select : DeltaConfig, optional
            Of a Δ-layer, which selects pages: their ids and counts.
        """
        plan = self._plan(query, inputs, options, pages, select) if _may_plan(query) else None
        if plan is None:
            return _by_operations(query, inputs, options, pages, select)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        ids, counts = pages or (None, None)
        selection = plan.run(
            query, inputs["k_cache"], inputs["v_cache"], inputs["block_table"], inputs["seq_lens"],
            options["sinks"], out, scratch, ids, counts,
        )  # fmt: skip
        return out, selection

    def _plan(
        self,
        query: Tensor,
        inputs: dict[str, Any],
        options: dict[str, Any],
        pages: tuple[Tensor, Tensor] | None,
        select: DeltaConfig | None,
    ) -> Any:
        if "k_scales" in inputs:  # caches of eight bits are not planned
            return None
        keys, values, table = inputs["k_cache"], inputs["v_cache"], inputs["block_table"]
        sinks = options["sinks"]
        kind = (
            query.shape, query.stride(), query.dtype, query.device, keys.shape, keys.stride(),
            keys.dtype, values.stride(), table.shape, table.stride(),
            None if pages is None else (pages[0].shape, pages[0].stride()),
            select is None, options["scale"], options["softcap"],
            None if sinks is None else sinks.dtype,
        )  # fmt: skip
        try:
            return self._plans[kind]
        except KeyError:
            pass
        if len(self._plans) >= _MOST:
            self._plans.clear()
        ids, counts = pages or (None, None)
        given = DecodeInputs(
            query, **inputs, **options, page_ids=ids, page_counts=counts,
            return_page_scores=select is not None,
        )  # fmt: skip
        plan = self._plans[kind] = plan_decode(given, select)
        return plan


def _may_plan(query: Tensor) -> bool:
    return query.is_cuda and not torch.is_grad_enabled()


def _by_operations(
    query: Tensor,
    inputs: dict[str, Any],
    options: dict[str, Any],
    pages: tuple[Tensor, Tensor] | None,
    select: DeltaConfig | None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    if select is not None:
        out, scores = decode_attention(query, **inputs, return_page_scores=True, **options)
        return out, select_pages(scores, inputs["seq_lens"], select)
    ids, counts = pages or (None, None)
    return decode_attention(query, **inputs, page_ids=ids, page_counts=counts, **options), None
