"""What the operations take: the inputs of every backend, and their checks.

Each check raises a one-line OperationError that names both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltadecode.errors import OperationError

_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


@dataclass
class DecodeInputs:
    """Inputs of :func:`deltadecode.ops.decode_attention`, which documents them.

    Every backend takes this type, and the schema of the registered operator follows from its
    fields: a new input is a field here, a parameter there, and what the backends make of it.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    scale: float
    page_size: int
    page_ids: Tensor | None = None
    page_counts: Tensor | None = None
    sinks: Tensor | None = None
    softcap: float | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0
    return_page_scores: bool = False


def check_select(page_scores: Tensor, seq_lens: Tensor) -> None:
    """Check the input of ``select_pages``."""
    if page_scores.dim() != 2 or not page_scores.is_floating_point():
        raise OperationError(f"page_scores must be a float [B, pages], got {_show(page_scores)}")
    _check_index("seq_lens", seq_lens, (page_scores.shape[0],), page_scores)


def check_decode(inputs: DecodeInputs) -> None:
    """Check the input of ``decode_attention``; shapes, types and devices only, never values."""
    q, block_table, seq_lens = inputs.q, inputs.block_table, inputs.seq_lens
    if q.dim() != 3 or q.dtype not in _FLOATS:
        raise OperationError(f"q must be a float [B, Hq, D], got {_show(q)}")
    _check_caches(q, inputs.k_cache, inputs.v_cache)
    rows, heads, _ = q.shape
    block_size, page_size = inputs.k_cache.shape[1], inputs.page_size
    if page_size < 1 or block_size % page_size:
        raise OperationError(
            f"block_size must be a multiple of page_size, got block_size {block_size} "
            f"and page_size {page_size}"
        )
    if block_table.dim() != 2:
        raise OperationError(f"block_table must be [B, blocks], got {_show(block_table)}")
    _check_index("block_table", block_table, (rows, block_table.shape[1]), q)
    _check_index("seq_lens", seq_lens, (rows,), q)
    if inputs.page_ids is not None or inputs.page_counts is not None:
        _check_pages(inputs, rows)
    sinks, softcap = inputs.sinks, inputs.softcap
    if sinks is not None and (
        sinks.shape != (heads,) or not sinks.is_floating_point() or sinks.device != q.device
    ):
        raise OperationError(f"sinks must be a float [{heads}] on {q.device}, got {_show(sinks)}")
    if softcap is not None and not softcap > 0:
        raise OperationError(f"softcap must be greater than 0, got {softcap}")


def _check_pages(inputs: DecodeInputs, rows: int) -> None:
    page_ids, page_counts = inputs.page_ids, inputs.page_counts
    if page_ids is None or page_counts is None:
        raise OperationError("page_ids and page_counts go together, got only one of them")
    if inputs.return_page_scores:
        raise OperationError("return_page_scores needs every token, got page_ids as well")
    if page_ids.dim() != 2:
        raise OperationError(f"page_ids must be [B, pages], got {_show(page_ids)}")
    _check_index("page_ids", page_ids, (rows, page_ids.shape[1]), inputs.q)
    _check_index("page_counts", page_counts, (rows,), inputs.q)


def _check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    shape, dtype, device = k_cache.shape, k_cache.dtype, q.device
    if len(shape) != 4 or shape != v_cache.shape:
        raise OperationError(
            f"k_cache and v_cache must both be [blocks, block_size, Hkv, D], got "
            f"{_show(k_cache)} and {_show(v_cache)}"
        )
    _, heads, dim = q.shape
    kv_heads = shape[2]
    if shape[3] != dim or kv_heads == 0 or heads % kv_heads:
        raise OperationError(
            f"q and k_cache must agree in D, and Hq must be a multiple of Hkv, got {_show(q)} "
            f"and {_show(k_cache)}"
        )
    if dtype != v_cache.dtype:
        raise OperationError(
            f"k_cache and v_cache must have one dtype, got {_show(k_cache)} and {_show(v_cache)}"
        )
    like_q = dtype == q.dtype or dtype == torch.float8_e4m3fn
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not like_q or cache.device != device:
            raise OperationError(
                f"{name} must be like q or float8_e4m3fn, got {_show(cache)} and q {_show(q)}"
            )
        if cache.stride(3) != 1 and dim > 1:
            raise OperationError(f"{name} must have last stride 1, got strides {cache.stride()}")


def _check_index(name: str, value: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if value.dtype != torch.int32 or value.shape != shape or value.device != like.device:
        raise OperationError(
            f"{name} must be int32 {list(shape)} on {like.device}, got {_show(value)}"
        )


def check_reach(seq_lens: Tensor, tokens: int, holder: str) -> None:
    """Check that no sequence is longer than its table; only where reading values is free."""
    if seq_lens.is_cpu:
        longest = max(seq_lens.tolist(), default=0)
        if longest > tokens:
            raise OperationError(
                f"seq_lens must not exceed the {tokens} tokens of {holder}, got {longest}"
            )


def needs_gradients(inputs: DecodeInputs) -> bool:
    """Whether autograd will ask for gradients of one of the inputs."""
    return torch.is_grad_enabled() and (
        inputs.q.requires_grad
        or inputs.k_cache.requires_grad
        or inputs.v_cache.requires_grad
        or (inputs.sinks is not None and inputs.sinks.requires_grad)
    )


def _show(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
