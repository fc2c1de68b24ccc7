"""Decode steps from a static cache: one path, whether run as it is, compiled, or in a CUDA graph.

Nothing depends on a value on the device, and no Python number changes from step to step: where the
rows lie and how long they are stays in tensors.

A static layer's buffer [B, Hkv, slots, D] is read as overlapping blocks of one page: block j starts
at slot j, one token after block j - 1. A row of a left-padded batch whose first token lies in slot
o has its page u in block ``row * Hkv * slots + o + u * P``, so that rows of any padding go through
one launch, without a copy, and pages count from a row's own first token (docs/semantics.md, R6).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltadecode.engines.transformers.state import ModelState
from deltadecode.ops import decode_attention, select_pages

_ROWS = "deltadecode::decode_rows"

# One opaque node of a graph, so that no compiler has to understand the overlapping blocks: copied,
# they would be a page's length times as large as the cache.
torch.library.define(
    _ROWS,
    "(Tensor q, Tensor keys, Tensor values, Tensor table, Tensor seq_lens, Tensor? page_ids, "
    "Tensor? page_counts, Tensor? sinks, float scale, int page_size, float? softcap, "
    "bool return_page_scores) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _decode_rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    seq_lens: Tensor,
    page_ids: Tensor | None,
    page_counts: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    page_size: int,
    softcap: float | None,
    return_page_scores: bool,
) -> tuple[Tensor, Tensor]:
    found = decode_attention(
        q, _blocks(keys, page_size), _blocks(values, page_size), table, seq_lens, scale=scale,
        page_size=page_size, page_ids=page_ids, page_counts=page_counts, sinks=sinks,
        softcap=softcap, return_page_scores=return_page_scores,
    )  # type: ignore[call-overload] # fmt: skip
    out, scores = found if return_page_scores else (found, q.new_empty(0, dtype=torch.float32))
    return out, scores


torch.library.impl(_ROWS, "CompositeExplicitAutograd", _decode_rows)


@torch.library.register_fake(_ROWS)
def _fake_decode_rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    seq_lens: Tensor,
    page_ids: Tensor | None,
    page_counts: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    page_size: int,
    softcap: float | None,
    return_page_scores: bool,
) -> tuple[Tensor, Tensor]:
    if not return_page_scores:
        return q.new_empty(q.shape), q.new_empty(0, dtype=torch.float32)
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(table.shape, dtype=dtype)


def _blocks(states: Tensor, page_size: int) -> Tensor:
    """A buffer [B, Hkv, slots, D] as overlapping blocks [starts, P, Hkv, D]."""
    rows, heads, slots, dim = states.shape
    starts = (rows - 1) * heads * slots + slots - page_size + 1
    return states.as_strided((starts, page_size, heads, dim), (dim, dim, slots * dim, 1))


@dataclass(eq=False)
class StaticStep:
    """One decode step: where the rows lie, and what Δ-layers have selected in it.

    Attributes
    ----------
    offsets : Tensor
        [B] int32, slot of each row's first token.
    seq_lens : Tensor
        [B] int32, tokens n of each row, the new one included.
    counted : Tensor
        int64 scalar: 1, or 0 when the only token is a prompt.
    tables : dict
        KV heads, slots and device of a layer -> its block table [B, pages] int32.
    selections : dict
        Δ-layer -> page ids and page counts.
    """

    offsets: Tensor
    seq_lens: Tensor
    counted: Tensor
    tables: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict)
    selections: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def table(self, key: Tensor, page_size: int) -> Tensor:
        """Block table of a layer with these keys."""
        rows, heads, slots, _ = key.shape
        known = self.tables.get((heads, slots, key.device))
        if known is not None:
            return known
        row = torch.arange(rows, dtype=torch.int32, device=key.device) * (heads * slots)
        page = torch.arange(slots // page_size, dtype=torch.int32, device=key.device) * page_size
        table = (row + self.offsets.to(key.device))[:, None] + page
        # Beyond a row's last page the entries mean nothing, but must name blocks that exist.
        table = table.clamp(max=(rows - 1) * heads * slots + slots - page_size)
        self.tables[heads, slots, key.device] = table
        return table


def static_attention(
    state: ModelState,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Attention of one planned layer at a decode step from a static cache.

    While a row has no more pages than the budget, its Δ-layers select all of them (R3), so that
    every step computes the same operations.

    Parameters
    ----------
    state : ModelState
        State of the model.
    layer : int
        The layer's number.
    query : Tensor
        [B, Hq, D].
    key, value : Tensor
        [B, Hkv, slots, D], buffers of a :class:`DeltaStaticLayer`.
    mask : Tensor or None
        [B or 1, 1, 1, slots] bool, True in one run of slots per row.
    options : dict
        ``scale``, ``page_size``, ``sinks`` and ``softcap``.

    Returns
    -------
    Tensor
        [B, Hq, D].

    Raises
    ------
    ValueError
        When the mask is none of a static cache.
    """
    cfg, source = state.cfg, state.plan.sources[layer]
    step = state.static.step
    if layer == state.first or step is None:
        step = state.static.step = _new_step(mask, key)
        if layer == state.first:
            full = step.seq_lens.sum(dtype=torch.int64) * step.counted
            amounts = torch.stack([step.counted, full, torch.zeros_like(full)])
            state.stats.device_counts(layer, key.device).add_(amounts.to(key.device))
    if layer == state.last:
        state.static.step = None  # else it would be an output of the compiled graph

    table, lens = step.table(key, cfg.page_size), step.seq_lens.to(key.device)
    delta = state.plan.roles[layer] == "delta"
    ids = counts = None
    if source is not None:
        if source not in step.selections:
            raise RuntimeError(
                f"layer {layer} reads the pages of Δ-layer {source}, which has not run in this step"
            )
        ids, counts = (part.to(key.device) for part in step.selections[source])
    run = torch.ops.deltadecode.decode_rows if torch.compiler.is_compiling() else _decode_rows
    out: Tensor
    out, scores = run(
        query, key, value, table, lens, ids, counts, options["sinks"], options["scale"],
        cfg.page_size, options["softcap"], delta,
    )  # fmt: skip
    if delta:
        ids, counts = step.selections[layer] = select_pages(scores, lens, cfg)
        tokens = _selected_tokens(ids, counts, lens, cfg.page_size) * step.counted.to(key.device)
        amounts = torch.nn.functional.pad(tokens[None], (2, 0))
        state.stats.device_counts(layer, key.device).add_(amounts)
    return out


def _new_step(mask: Tensor | None, key: Tensor) -> StaticStep:
    rows, _, slots, _ = key.shape
    if mask is None or mask.dtype != torch.bool or mask.shape[1:] != (1, 1, slots):
        given = "none" if mask is None else f"{mask.dtype} {list(mask.shape)}"
        raise ValueError(
            f"a decode step from a static cache needs a torch.bool mask [rows, 1, 1, {slots}], "
            f"got {given}"
        )
    valid = mask[:, 0, 0].expand(rows, slots)
    seq_lens = valid.sum(dim=1, dtype=torch.int32)
    offsets = valid.int().argmax(dim=1).int()
    # One token without a past is a prompt.
    counted = ((offsets + seq_lens).max() > 1).long()
    return StaticStep(offsets, seq_lens, counted)


def _selected_tokens(ids: Tensor, counts: Tensor, lens: Tensor, page_size: int) -> Tensor:
    """Tokens on the selected pages of all rows, an int64 scalar; only the last can be partial."""
    pages = (lens + (page_size - 1)) // page_size
    last = ids.gather(1, (counts - 1).clamp(min=0)[:, None].long())[:, 0]
    missing = torch.where(last == pages - 1, pages * page_size - lens, 0)
    return (counts * page_size - missing).sum(dtype=torch.int64)
