"""The operations as ``torch.ops.deltadecode.*``, which compiled graphs and CUDA graphs can hold.

A compiler sees each as one opaque node with a known output shape; :mod:`deltadecode.ops` calls them
while it is being traced, and its makers directly otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltadecode.config import DeltaConfig

_DECODE = "deltadecode::decode_attention"
_SELECT = "deltadecode::select_pages"

torch.library.define(
    _DECODE,
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, "
    "Tensor? page_ids, Tensor? page_counts, Tensor? sinks, float scale, int page_size, "
    "float? softcap, float k_scale, float v_scale, bool return_page_scores, str backend) "
    "-> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    _SELECT,
    "(Tensor page_scores, Tensor seq_lens, int page_size, int budget_pages, int recent_pages, "
    "int sink_pages, str backend) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_DECODE, "CompositeExplicitAutograd")
def _decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    page_ids: Tensor | None,
    page_counts: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    page_size: int,
    softcap: float | None,
    k_scale: float,
    v_scale: float,
    return_page_scores: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    from deltadecode.ops import decode_attention

    found = decode_attention(
        q, k_cache, v_cache, block_table, seq_lens, scale=scale, page_size=page_size,
        page_ids=page_ids, page_counts=page_counts, sinks=sinks, softcap=softcap, k_scale=k_scale,
        v_scale=v_scale, return_page_scores=return_page_scores, backend=backend,
    )  # type: ignore[call-overload] # fmt: skip
    out, scores = found if return_page_scores else (found, q.new_empty(0, dtype=torch.float32))
    return out, scores


@torch.library.register_fake(_DECODE)  # type: ignore[untyped-decorator]
def _fake_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    page_ids: Tensor | None,
    page_counts: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    page_size: int,
    softcap: float | None,
    k_scale: float,
    v_scale: float,
    return_page_scores: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if not return_page_scores:
        return q.new_empty(q.shape), q.new_empty(0, dtype=torch.float32)
    dtype = torch.promote_types(q.dtype, torch.float32)
    pages = block_table.shape[1] * k_cache.shape[1] // page_size
    return q.new_empty(q.shape), q.new_empty((q.shape[0], pages), dtype=dtype)


@torch.library.impl(_SELECT, "CompositeExplicitAutograd")
def _select_pages(
    page_scores: Tensor,
    seq_lens: Tensor,
    page_size: int,
    budget_pages: int,
    recent_pages: int,
    sink_pages: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    from deltadecode.ops import select_pages

    cfg = DeltaConfig(page_size, budget_pages, recent_pages, sink_pages)
    return select_pages(page_scores, seq_lens, cfg, backend=backend)


@torch.library.register_fake(_SELECT)  # type: ignore[untyped-decorator]
def _fake_select_pages(
    page_scores: Tensor,
    seq_lens: Tensor,
    page_size: int,
    budget_pages: int,
    recent_pages: int,
    sink_pages: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    ids = page_scores.new_empty((page_scores.shape[0], budget_pages), dtype=torch.int32)
    return ids, torch.empty_like(seq_lens)
