"""The operations as users and engines call them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.ops.dispatch import run_index, run_select
from deltadecode.ops.inputs import DecodeInputs, check_index, check_select
from deltadecode.ops.library import decode, select


def select_pages(
    page_scores: Tensor, seq_lens: Tensor, cfg: DeltaConfig, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Select the pages that sparse layers read (R3, R4).

    With n tokens in a row, N = ⌈n / P⌉ pages and K(N) of :meth:`DeltaConfig.pages_for`: all pages
    if N ≤ K(N), else the last L, the first S, and of the others the K(N) - L - S with the largest
    score. Ties go to the lower page; NaN ranks below every number. Scores of pages ≥ N are ignored.
    Each of the Q last tokens of a verify row selects for itself (R10).

    Parameters
    ----------
    page_scores : Tensor
        [B, pages] or [B, Q, pages], any float dtype, pages ≥ max N; S_u of
        :func:`decode_attention`.
    seq_lens : Tensor
        [B] int32, tokens per row, the new ones included.
    cfg : DeltaConfig
        Gives P, K, its share, L and S; its layers play no part.
    backend : str
        ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Returns
    -------
    page_ids : Tensor
        [B, :meth:`DeltaConfig.table_width` (pages)] int32, ascending, padded with -1; K columns
        without a share. [B, Q, ...] for scores with a Q.
    page_counts : Tensor
        [B] or [B, Q] int32, min(N, K(N)).

    Raises
    ------
    OperationError
        When a type, shape or device is wrong, or (CPU) a row is longer than its scores or shorter
        than 0.
    """
    check_select(page_scores, seq_lens, cfg)
    if torch.compiler.is_compiling():
        return select(page_scores, seq_lens, cfg, backend)
    return run_select(page_scores, seq_lens, cfg, backend)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    page_size: int,
    page_ids: Tensor | None = None,
    page_counts: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    return_page_scores: bool = False,
    score_last: bool = False,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    backend: str = "auto",
) -> Any:  # a union of Tensor and tuple would make every caller tell them apart
    """Attend with the new tokens of each row over a paged KV cache (R2, R5, R6, R7, R10).

    Token t of row b is slot ``t % block_size`` of block ``block_table[b, t // block_size]``.
    Without ``page_ids`` a row attends to its n tokens (dense and Δ-layers), with them to the tokens
    of its selected pages (sparse layers). Slots that are not attended to are never read into a
    result, whatever they hold; neither are table entries past the last token.

    A row has one new token, its n-th. With q of [B, Q, Hq, D] it has Q, all in the cache: token j
    attends as if it were decoded alone, as the last of n - Q + 1 + j tokens. A padding row may have
    fewer than Q; the tokens that it is too short for give zeros.

    Gradients reach q, the caches and the sinks; ``"auto"`` takes ``"torch"`` where they are needed.

    Parameters
    ----------
    q : Tensor
        [B, Hq, D] or [B, Q, Hq, D], Q ≥ 1; float32, bfloat16, float16 or float64.
    k_cache, v_cache : Tensor
        [blocks, block_size, Hkv, D] like q, float8_e4m3fn, or int8 with ``k_scales`` and
        ``v_scales``; any strides with the last one 1. Hkv divides Hq; query head h reads KV head
        h // (Hq / Hkv). ``page_size`` divides block_size.
    block_table : Tensor
        [B, blocks_max] int32.
    seq_lens : Tensor
        [B] int32, tokens n per row, the new ones included. A row of 0 tokens gives zeros.
    scale : float
        Factor on q · k.
    page_size : int
        Tokens of a page, P.
    page_ids : Tensor, optional
        [B, any] or [B, Q, any] int32, the selected pages, ascending and below ⌈n / P⌉, as
        :func:`select_pages` gives them; only the first ``page_counts`` of a row count.
    page_counts : Tensor, optional
        [B] or [B, Q] int32; with ``page_ids`` only, and required with them. A row with -1 attends
        to all its tokens, whatever its page ids: a sparse layer's batch can hold the end of a
        prompt.
    sinks : Tensor, optional
        [Hq] float, a logit per head that enters the softmax denominator and is no token.
    softcap : float, optional
        Logits become ``softcap * tanh(logit / softcap)``, after the scale.
    k_scale, v_scale : float
        What stored keys and values are multiplied by, for caches of 8 bits.
    return_page_scores : bool
        Return S_u too: s_t is the largest softmax weight of token t over the query heads, S_u the
        sum of s_t over the tokens of page u. Not with ``page_ids``.
    score_last : bool
        Of the Q tokens of a row, score pages for the last one only.
    k_scales, v_scales : Tensor, optional
        [blocks, block_size, Hkv] float, both with the same strides: what the stored keys and values
        of each token and KV head are multiplied by besides, for caches of 8 bits.
    backend : str
        ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Returns
    -------
    out : Tensor
        Shaped and typed like q. Softmax and sums are float32 (float64 for float64 input).
    page_scores : Tensor
        Only with ``return_page_scores``, else ``out`` alone: [B, blocks_max * block_size // P] or
        [B, Q, ...] (with ``score_last`` [B, ...]), float32 (float64 for float64 input), 0 for pages
        past the last token.

    Raises
    ------
    OperationError
        When types, shapes or devices do not fit, a number is not finite, (CPU) a row is longer
        than its table or shorter than 0, or gradients are needed of what computes none:
        ``"triton"``, or a compiled graph.
    """
    inputs = DecodeInputs(
        q, k_cache, v_cache, block_table, seq_lens, scale, page_size, page_ids, page_counts, sinks,
        softcap, k_scale, v_scale, return_page_scores, score_last, k_scales, v_scales,
    )  # fmt: skip
    out, scores = decode(inputs, backend)
    return (out, scores) if return_page_scores else out


def index_scores(
    q: Tensor,
    keys: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Score every token of each row against one query: what an index selects by.

    Token t of row b is where :func:`decode_attention` has it. With pages of one token,
    :func:`select_pages` makes the exact top-k of these scores. No gradients.

    Parameters
    ----------
    q : Tensor
        [B, D]; float32, bfloat16, float16 or float64.
    keys : Tensor
        [blocks, block_size, D] like q, with last stride 1.
    block_table : Tensor
        [B, blocks_max] int32.
    seq_lens : Tensor
        [B] int32, tokens n per row.
    scale : float
        Factor on q · k.
    backend : str
        ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Returns
    -------
    Tensor
        [B, blocks_max * block_size], float32 (float64 for float64 input); what stands behind the
        n-th score of a row means nothing.

    Raises
    ------
    OperationError
        When a type, shape or device is wrong, the scale is not finite, or (CPU) a row is longer
        than its table or shorter than 0.
    """
    check_index(q, keys, block_table, seq_lens, scale)
    return run_index(q, keys, block_table, seq_lens, scale, backend)
