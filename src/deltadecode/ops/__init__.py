"""The operations of a decode step: one contract each, several makers.

Makers: ``reference`` is the definition; ``cpu`` is fast plain PyTorch, tuned on CPUs; ``triton``
has the GPU kernels. The first two run on any device. ``backend="auto"`` takes ``triton`` on CUDA
where it supports the tensors, else ``cpu``. All follow the rules R1..R9 of docs/semantics.md, those
of arXiv 2510.09883.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Literal, overload

import torch
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.ops import cpu, library, reference  # noqa: F401  (library registers)
from deltadecode.ops.checks import check_decode, check_reach, check_select

__all__ = ["decode_attention", "select_pages"]


def select_pages(
    page_scores: Tensor, seq_lens: Tensor, cfg: DeltaConfig, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Select the pages that sparse layers read (R3, R4).

    With n tokens in a row and N = ⌈n / P⌉ pages: all pages if N ≤ K, else the last L, the first S,
    and of the others the K - L - S with the largest score. Ties go to the lower page; NaN ranks
    below every number. Scores of pages ≥ N are ignored.

    Parameters
    ----------
    page_scores : Tensor
        [B, pages], any float dtype, pages ≥ max N; S_u of :func:`decode_attention`.
    seq_lens : Tensor
        [B] int32, tokens per row, the new one included.
    cfg : DeltaConfig
        Gives P, K, L and S; its layers play no part.
    backend : str
        ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.

    Returns
    -------
    page_ids : Tensor
        [B, K] int32, ascending, padded with -1.
    page_counts : Tensor
        [B] int32, min(N, K).

    Raises
    ------
    ValueError
        When a shape, dtype or device is wrong, or (CPU) a row is longer than its scores.
    """
    check_select(page_scores, seq_lens)
    if torch.compiler.is_compiling():
        ids_and_counts: tuple[Tensor, Tensor] = torch.ops.deltadecode.select_pages(
            page_scores, seq_lens, cfg.page_size, cfg.budget_pages, cfg.recent_pages,
            cfg.sink_pages, backend,
        )  # fmt: skip
        return ids_and_counts
    check_reach(seq_lens, page_scores.shape[1] * cfg.page_size, "page_scores")
    maker = _maker(backend, page_scores)
    page_ids, page_counts = maker.select_pages(page_scores, seq_lens, cfg)
    return page_ids, page_counts


@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    page_size: int,
    page_ids: Tensor | None = ...,
    page_counts: Tensor | None = ...,
    sinks: Tensor | None = ...,
    softcap: float | None = ...,
    k_scale: float = ...,
    v_scale: float = ...,
    return_page_scores: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    page_size: int,
    page_ids: None = ...,
    page_counts: None = ...,
    sinks: Tensor | None = ...,
    softcap: float | None = ...,
    k_scale: float = ...,
    v_scale: float = ...,
    return_page_scores: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend with one new token per row over a paged KV cache (R2, R5, R6, R7).

    Token t of row b is slot ``t % block_size`` of block ``block_table[b, t // block_size]``.
    Without ``page_ids`` a row attends to its n tokens (dense and Δ-layers), with them to the tokens
    of its selected pages (sparse layers). Slots that are not attended to are never read into a
    result, whatever they hold; neither are table entries past the last token.

    Parameters
    ----------
    q : Tensor
        [B, Hq, D] float32, bfloat16, float16 or float64.
    k_cache, v_cache : Tensor
        [blocks, block_size, Hkv, D] like q, or float8_e4m3fn; any strides with the last one 1. Hkv
        divides Hq; query head h reads KV head h // (Hq / Hkv). ``page_size`` divides block_size.
    block_table : Tensor
        [B, blocks_max] int32.
    seq_lens : Tensor
        [B] int32, tokens n per row, the new one included. A row of 0 tokens gives zeros.
    scale : float
        Factor on q · k.
    page_size : int
        Tokens of a page, P.
    page_ids : Tensor, optional
        [B, K] int32, the selected pages, ascending and below ⌈n / P⌉, as :func:`select_pages` gives
        them; only the first ``page_counts`` of a row count.
    page_counts : Tensor, optional
        [B] int32; with ``page_ids`` only, and required with them. A row with -1 attends to all its
        tokens, whatever its page ids: a sparse layer's batch can hold the end of a prompt.
    sinks : Tensor, optional
        [Hq] float, a logit per head that enters the softmax denominator and is no token.
    softcap : float, optional
        Logits become ``softcap * tanh(logit / softcap)``, after the scale.
    k_scale, v_scale : float
        What stored keys and values are multiplied by, for caches of 8 bits.
    return_page_scores : bool
        Return S_u too: s_t is the largest softmax weight of token t over the query heads, S_u the
        sum of s_t over the tokens of page u. Not with ``page_ids``.
    backend : str
        ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.

    Returns
    -------
    out : Tensor
        [B, Hq, D] like q. Softmax and sums are float32 (float64 for float64 input).
    page_scores : Tensor
        With ``return_page_scores``: [B, blocks_max * block_size // P] float32 (float64 for float64
        input), 0 for pages past the last token.

    Raises
    ------
    ValueError
        When shapes, dtypes or devices do not fit, or (CPU) a row is longer than its table.
    """
    check_decode(
        q, k_cache, v_cache, block_table, seq_lens, page_size, page_ids, page_counts, sinks,
        softcap, return_page_scores,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        out, scores = torch.ops.deltadecode.decode_attention(
            q, k_cache, v_cache, block_table, seq_lens, page_ids, page_counts, sinks, scale,
            page_size, softcap, k_scale, v_scale, return_page_scores, backend,
        )  # fmt: skip
        return (out, scores) if return_page_scores else out
    check_reach(seq_lens, block_table.shape[1] * k_cache.shape[1], "block_table")
    result: Tensor | tuple[Tensor, Tensor] = _maker(backend, q, k_cache).decode_attention(
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        scale=scale,
        page_size=page_size,
        page_ids=page_ids,
        page_counts=page_counts,
        sinks=sinks,
        softcap=softcap,
        k_scale=k_scale,
        v_scale=v_scale,
        return_page_scores=return_page_scores,
    )
    return result


def kernels_refuse(tensor: Tensor, k_cache: Tensor | None = None) -> str | None:
    """Why the Triton kernels do not compute with such tensors.

    The other makers wait for the GPU, which a CUDA graph cannot hold.

    Parameters
    ----------
    tensor : Tensor
        q [B, Hq, D], or page scores [B, pages] when there is no cache.
    k_cache : Tensor, optional
        [blocks, block_size, Hkv, D].

    Returns
    -------
    str or None
        In one line; None when they do.
    """
    kernels = _triton()
    if kernels is None:
        return "needs the package triton, which is not installed"
    reason: str | None = kernels.unsupported(tensor, k_cache)
    return reason


def _maker(backend: str, tensor: Tensor, k_cache: Tensor | None = None) -> ModuleType:
    """Module that computes an operation, given its first inputs."""
    if backend == "reference":
        return reference
    if backend == "cpu" or (backend == "auto" and not tensor.is_cuda):
        return cpu
    if backend not in ("auto", "triton"):
        raise ValueError(f"backend must be 'auto', 'reference', 'cpu' or 'triton', got {backend!r}")
    reason = kernels_refuse(tensor, k_cache)
    if reason is None:
        kernels = _triton()
        assert kernels is not None
        return kernels
    if backend == "triton":
        raise ValueError(f"backend 'triton' {reason}")
    return cpu


@functools.cache
def _triton() -> ModuleType | None:
    """The kernels, imported when first asked for; None without Triton."""
    try:
        return importlib.import_module("deltadecode.ops.triton")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None
