"""Decode steps from a static cache: one path, whether run as it is, compiled, or in a CUDA graph.

Nothing depends on a value on the device, and no Python number changes from step to step: where the
rows lie and how long they are stays in tensors.

A static layer's buffer [B, Hkv, slots, D] is read as overlapping blocks of one page: block j starts
at slot j, one token after block j - 1. A row of a left-padded batch whose first token lies in slot
o has its page u in block ``row * Hkv * slots + o + u * P``, so that rows of any padding go through
one launch, without a copy, and pages count from a row's own first token (docs/semantics.md, R6).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltadecode.engines.transformers.state import ModelState
from deltadecode.engines.transformers.step import StaticStep
from deltadecode.errors import MissingSelectionError
from deltadecode.ops import DecodeInputs, select_pages
from deltadecode.ops.library import register_decode


def _blocks(states: Tensor, page_size: int) -> Tensor:
    """A buffer [B, Hkv, slots, D] as overlapping blocks [starts, P, Hkv, D]."""
    rows, heads, slots, dim = states.shape
    starts = (rows - 1) * heads * slots + slots - page_size + 1
    return states.as_strided((starts, page_size, heads, dim), (dim, dim, slots * dim, 1))


def _in_blocks(inputs: DecodeInputs) -> DecodeInputs:
    """Read the caches, buffers [B, Hkv, slots, D], as overlapping blocks."""
    inputs.k_cache = _blocks(inputs.k_cache, inputs.page_size)
    inputs.v_cache = _blocks(inputs.v_cache, inputs.page_size)
    return inputs


# One opaque node of a graph, so that no compiler has to understand the overlapping blocks: copied,
# they would be a page's length times as large as the cache.
decode_rows = register_decode("decode_rows", _in_blocks)


def static_attention(
    state: ModelState,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    full: bool,
) -> Tensor | None:
    """Attention of one planned layer at a decode step from a static cache.

    While a row has no more pages than the budget, its Δ-layers select all of them (R3), so that
    every step computes the same operations.

    Query [B, Hq, D] to the output [B, Hq, D]. Key and value [B, Hkv, slots, D] are buffers of a
    :class:`DeltaStaticLayer`. The mask is [B or 1, 1, 1, slots] bool, True in one run of slots per
    row; another one is an ArgumentError. ``options`` are ``scale``, ``page_size``, ``sinks`` and
    ``softcap``. With ``full``, as where gradients are needed, only the counts are kept here, and
    None is returned.
    """
    cfg, source = state.cfg, state.plan.sources[layer]
    step = state.static.step
    if layer == state.first or step is None:
        step = state.static.step = StaticStep.of(mask, key)
        if layer == state.first:
            tokens = step.seq_lens.sum(dtype=torch.int64) * step.counted
            amounts = torch.stack([step.counted, tokens, torch.zeros_like(tokens)])
            state.stats.device_counts(layer, key.device).add_(amounts.to(key.device))
    if layer == state.last:
        state.static.step = None  # else it would be an output of the compiled graph

    table, lens = step.table(key, cfg.page_size), step.seq_lens.to(key.device)
    delta = state.plan.roles[layer] == "delta"
    if full:
        if delta:
            _count_selected(state, layer, lens.sum(dtype=torch.int64), step, key)
        return None
    ids = counts = None
    if source is not None:
        if source not in step.selections:
            raise MissingSelectionError(layer, source)
        ids, counts = (part.to(key.device) for part in step.selections[source])
    inputs = DecodeInputs(
        query, key, value, table, lens, options["scale"], cfg.page_size, ids, counts,
        options["sinks"], options["softcap"], return_page_scores=delta,
    )  # fmt: skip
    out, scores = decode_rows(inputs)
    if scores is not None:
        ids, counts = step.selections[layer] = select_pages(scores, lens, cfg)
        tokens = _selected_tokens(ids, counts, lens, cfg.page_size)
        _count_selected(state, layer, tokens, step, key)
    return out


def _count_selected(
    state: ModelState, layer: int, tokens: Tensor, step: StaticStep, key: Tensor
) -> None:
    """Count what each sparse layer of a Δ-layer reads; tokens is an int64 scalar."""
    amounts = torch.nn.functional.pad((tokens * step.counted.to(key.device))[None], (2, 0))
    state.stats.device_counts(layer, key.device).add_(amounts)


def _selected_tokens(ids: Tensor, counts: Tensor, lens: Tensor, page_size: int) -> Tensor:
    """Tokens on the selected pages of all rows, an int64 scalar; only the last can be partial."""
    pages = (lens + (page_size - 1)) // page_size
    last = ids.gather(1, (counts - 1).clamp(min=0)[:, None].long())[:, 0]
    missing = torch.where(last == pages - 1, pages * page_size - lens, 0)
    return (counts * page_size - missing).sum(dtype=torch.int64)
