"""What the operations accept: each function raises a one-line ValueError that names both sides."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def check_select(page_scores: Tensor, seq_lens: Tensor) -> None:
    """Check the input of ``select_pages``."""
    if page_scores.dim() != 2 or not page_scores.is_floating_point():
        raise ValueError(f"page_scores must be a float [B, pages], got {_show(page_scores)}")
    _check_index("seq_lens", seq_lens, (page_scores.shape[0],), page_scores)


def check_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    page_size: int,
    page_ids: Tensor | None,
    page_counts: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None,
    return_page_scores: bool,
) -> None:
    """Check the input of ``decode_attention``; shapes, types and devices only, never values."""
    if q.dim() != 3 or q.dtype not in _FLOATS:
        raise ValueError(f"q must be a float [B, Hq, D], got {_show(q)}")
    _check_caches(q, k_cache, v_cache)
    rows, heads, _ = q.shape
    if page_size < 1 or k_cache.shape[1] % page_size:
        raise ValueError(
            f"block_size must be a multiple of page_size, got block_size {k_cache.shape[1]} "
            f"and page_size {page_size}"
        )
    if block_table.dim() != 2:
        raise ValueError(f"block_table must be [B, blocks], got {_show(block_table)}")
    _check_index("block_table", block_table, (rows, block_table.shape[1]), q)
    _check_index("seq_lens", seq_lens, (rows,), q)
    if page_ids is None and page_counts is None:
        pass
    elif page_ids is None or page_counts is None:
        raise ValueError("page_ids and page_counts go together, got only one of them")
    elif return_page_scores:
        raise ValueError("return_page_scores needs every token, got page_ids as well")
    elif page_ids.dim() != 2:
        raise ValueError(f"page_ids must be [B, pages], got {_show(page_ids)}")
    else:
        _check_index("page_ids", page_ids, (rows, page_ids.shape[1]), q)
        _check_index("page_counts", page_counts, (rows,), q)
    if sinks is not None and (
        sinks.shape != (heads,) or not sinks.is_floating_point() or sinks.device != q.device
    ):
        raise ValueError(f"sinks must be a float [{heads}] on {q.device}, got {_show(sinks)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be greater than 0, got {softcap}")


def _check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"k_cache and v_cache must both be [blocks, block_size, Hkv, D], got "
            f"{_show(k_cache)} and {_show(v_cache)}"
        )
    heads, dim = q.shape[1:]
    kv_heads = k_cache.shape[2]
    if k_cache.shape[3] != dim or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"q and k_cache must agree in D, and Hq must be a multiple of Hkv, got {_show(q)} "
            f"and {_show(k_cache)}"
        )
    if k_cache.dtype != v_cache.dtype:
        raise ValueError(
            f"k_cache and v_cache must have one dtype, got {_show(k_cache)} and {_show(v_cache)}"
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype not in (q.dtype, torch.float8_e4m3fn) or cache.device != q.device:
            raise ValueError(
                f"{name} must be like q or float8_e4m3fn, got {_show(cache)} and q {_show(q)}"
            )
        if cache.stride(3) != 1 and dim > 1:
            raise ValueError(f"{name} must have last stride 1, got strides {cache.stride()}")


def _check_index(name: str, value: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if value.dtype != torch.int32 or value.shape != shape or value.device != like.device:
        raise ValueError(f"{name} must be int32 {list(shape)} on {like.device}, got {_show(value)}")


def check_reach(seq_lens: Tensor, tokens: int, holder: str) -> None:
    """Check that no sequence is longer than its table; only where reading values is free."""
    if seq_lens.device.type == "cpu":
        longest = max(seq_lens.tolist(), default=0)
        if longest > tokens:
            raise ValueError(
                f"seq_lens must not exceed the {tokens} tokens of {holder}, got {longest}"
            )


def _show(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
