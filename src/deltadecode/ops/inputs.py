"""What the operations take: the inputs of every backend, and their checks.

Each check raises a one-line OperationError that names both sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.errors import OperationError

_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
# What caches may hold beside the type of q.
EIGHT_BITS = frozenset({torch.float8_e4m3fn, torch.int8})
_OPTIONAL = ("page_ids", "page_counts", "sinks", "k_scales", "v_scales")


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
    score_last: bool = False
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    @property
    def scored_queries(self) -> tuple[int, ...]:
        """Shape of the queries that have page scores: (B,) or (B, Q)."""
        queries = self.q.shape[:-2]
        return tuple(queries[:1] if self.score_last else queries)


def check_select(page_scores: Tensor, seq_lens: Tensor, cfg: DeltaConfig) -> None:
    """Check the input of ``select_pages``."""
    _check_tensors(page_scores=page_scores, seq_lens=seq_lens)
    if not isinstance(cfg, DeltaConfig):
        raise OperationError(f"cfg must be a DeltaConfig, got {type(cfg).__name__}")
    if page_scores.dim() not in (2, 3) or not page_scores.is_floating_point():
        raise OperationError(
            f"page_scores must be a float [B, pages] or [B, Q, pages], got {_show(page_scores)}"
        )
    _check_index("seq_lens", seq_lens, (page_scores.shape[0],), page_scores)


def check_index(
    q: Tensor, keys: Tensor, block_table: Tensor, seq_lens: Tensor, scale: float
) -> None:
    """Check the input of ``index_scores``; never values of tensors."""
    _check_tensors(q=q, keys=keys, block_table=block_table, seq_lens=seq_lens)
    _check_number("scale", scale)
    if q.dim() != 2 or q.dtype not in _FLOATS:
        raise OperationError(f"q must be a float [B, D], got {_show(q)}")
    if (
        keys.dim() != 3
        or (keys.shape[2], keys.dtype, keys.device) != (q.shape[1], q.dtype, q.device)
        or keys.stride(2) != 1
        or keys.shape[1] == 0
    ):
        raise OperationError(
            f"keys must be [blocks, block_size, D] like q, with last stride 1, got {_show(keys)} "
            f"and q {_show(q)}"
        )
    if block_table.dim() != 2:
        raise OperationError(f"block_table must be [B, blocks], got {_show(block_table)}")
    _check_index("block_table", block_table, (q.shape[0], block_table.shape[1]), q)
    _check_index("seq_lens", seq_lens, (q.shape[0],), q)


def check_decode(inputs: DecodeInputs) -> None:
    """Check the input of ``decode_attention``; shapes, types and devices only, never values."""
    q, block_table, seq_lens = inputs.q, inputs.block_table, inputs.seq_lens
    _check_tensors(
        q=q, k_cache=inputs.k_cache, v_cache=inputs.v_cache, block_table=block_table,
        seq_lens=seq_lens,
    )  # fmt: skip
    given = {name: getattr(inputs, name) for name in _OPTIONAL}
    _check_tensors(**{name: value for name, value in given.items() if value is not None})
    if q.dim() not in (3, 4) or q.dtype not in _FLOATS or 0 in q.shape[1:-2]:
        raise OperationError(f"q must be a float [B, Hq, D] or [B, Q, Hq, D], got {_show(q)}")
    _check_caches(q, inputs.k_cache, inputs.v_cache)
    _check_scales(inputs)
    rows, heads = q.shape[0], q.shape[-2]
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
        _check_pages(inputs)
    sinks, softcap = inputs.sinks, inputs.softcap
    if sinks is not None and (
        sinks.shape != (heads,) or not sinks.is_floating_point() or sinks.device != q.device
    ):
        raise OperationError(f"sinks must be a float [{heads}] on {q.device}, got {_show(sinks)}")
    if softcap is not None and not softcap > 0:
        raise OperationError(f"softcap must be greater than 0, got {softcap}")


def check_numbers(inputs: DecodeInputs) -> None:
    """Check the input of ``decode_attention`` that is no tensor; not while it is traced."""
    if type(inputs.page_size) is not int:
        raise OperationError(f"page_size must be an int, got {inputs.page_size!r}")
    for name in ("scale", "k_scale", "v_scale"):
        _check_number(name, getattr(inputs, name))
    if inputs.softcap is not None:
        _check_number("softcap", inputs.softcap)


def _check_tensors(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise OperationError(f"{name} must be a tensor, got {type(value).__name__}")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise OperationError(f"{name} must be a finite number, got {value!r}")


def _check_pages(inputs: DecodeInputs) -> None:
    page_ids, page_counts = inputs.page_ids, inputs.page_counts
    if page_ids is None or page_counts is None:
        raise OperationError("page_ids and page_counts go together, got only one of them")
    if inputs.return_page_scores:
        raise OperationError("return_page_scores needs every token, got page_ids as well")
    queries = inputs.q.shape[:-2]
    if page_ids.dim() != len(queries) + 1:
        rows = "B, Q" if len(queries) == 2 else "B"
        raise OperationError(f"page_ids must be [{rows}, pages], got {_show(page_ids)}")
    _check_index("page_ids", page_ids, (*queries, page_ids.shape[-1]), inputs.q)
    _check_index("page_counts", page_counts, queries, inputs.q)


def _check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    shape, dtype, device = k_cache.shape, k_cache.dtype, q.device
    if len(shape) != 4 or shape != v_cache.shape:
        raise OperationError(
            f"k_cache and v_cache must both be [blocks, block_size, Hkv, D], got "
            f"{_show(k_cache)} and {_show(v_cache)}"
        )
    heads, dim = q.shape[-2:]
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
    known = dtype == q.dtype or dtype in EIGHT_BITS
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not known or cache.device != device:
            raise OperationError(
                f"{name} must be like q, float8_e4m3fn or int8, got {_show(cache)} and q {_show(q)}"
            )
        if cache.stride(3) != 1 and dim > 1:
            raise OperationError(f"{name} must have last stride 1, got strides {cache.stride()}")


def _check_scales(inputs: DecodeInputs) -> None:
    cache, keys, values = inputs.k_cache, inputs.k_scales, inputs.v_scales
    if keys is None and values is None:
        if cache.dtype == torch.int8:
            raise OperationError("int8 caches need k_scales and v_scales, got neither")
        return
    if keys is None or values is None:
        raise OperationError("k_scales and v_scales go together, got only one of them")
    if cache.dtype not in EIGHT_BITS:
        raise OperationError(f"scales of tokens are for caches of 8 bits, got {_show(cache)}")
    for name, scales in (("k_scales", keys), ("v_scales", values)):
        if (
            scales.shape != cache.shape[:3]
            or not scales.is_floating_point()
            or scales.device != cache.device
        ):
            raise OperationError(
                f"{name} must be a float {list(cache.shape[:3])} on {cache.device}, got "
                f"{_show(scales)}"
            )
    if keys.stride() != values.stride() or keys.dtype != values.dtype:
        raise OperationError(
            f"k_scales and v_scales must be alike, got {_show(keys)} with strides {keys.stride()} "
            f"and {_show(values)} with strides {values.stride()}"
        )


def _check_index(name: str, value: Tensor, shape: Sequence[int], like: Tensor) -> None:
    if value.dtype != torch.int32 or value.shape != shape or value.device != like.device:
        raise OperationError(
            f"{name} must be int32 {list(shape)} on {like.device}, got {_show(value)}"
        )


def check_reach(seq_lens: Tensor, tokens: int, holder: str) -> None:
    """Check that a table can have rows so long; only where reading values is free."""
    if seq_lens.is_cpu:
        lengths = seq_lens.tolist()
        shortest, longest = min(lengths, default=0), max(lengths, default=0)
        if shortest < 0:
            raise OperationError(f"seq_lens must not be negative, got {shortest}")
        if longest > tokens:
            raise OperationError(
                f"seq_lens must not exceed the {tokens} tokens of {holder}, got {longest}"
            )


def token_lengths(seq_lens: Tensor, tokens: int) -> Tensor:
    """Tokens that each of a row's last ``tokens`` ones sees, itself included: [B] to [B, tokens].

    0 for those that a row is too short to have.
    """
    before = torch.arange(1 - tokens, 1, dtype=torch.int32, device=seq_lens.device)
    return (seq_lens[:, None] + before).clamp_(min=0)


def each_token_alone(inputs: DecodeInputs) -> DecodeInputs:
    """Inputs with the Q tokens of each verify row as rows of their own, [B * Q, Hq, D]."""
    tokens, ids, counts = inputs.q.shape[1], inputs.page_ids, inputs.page_counts
    return replace(
        inputs,
        q=inputs.q.flatten(0, 1),
        block_table=inputs.block_table.repeat_interleave(tokens, 0),
        seq_lens=token_lengths(inputs.seq_lens, tokens).flatten(),
        page_ids=None if ids is None else ids.flatten(0, 1),
        page_counts=None if counts is None else counts.flatten(),
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
