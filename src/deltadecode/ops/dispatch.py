"""Which backend computes an operation."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from torch import Tensor, device, dtype

from deltadecode.config import DeltaConfig
from deltadecode.errors import OperationError
from deltadecode.ops import reference
from deltadecode.ops import torch as torch_backend
from deltadecode.ops.inputs import (
    DecodeInputs,
    check_decode,
    check_numbers,
    check_reach,
    each_token_alone,
    needs_gradients,
    token_lengths,
)


def kernels_refuse(tensor: Tensor, k_cache: Tensor | None = None) -> str | None:
    """Why the Triton kernels do not compute with such tensors, in one line; None when they do.

    The other backends wait for the GPU, which a CUDA graph cannot hold.

    Parameters
    ----------
    tensor : Tensor
        q [..., Hq, D], or page scores [B, pages] when there is no cache.
    k_cache : Tensor, optional
        [blocks, block_size, Hkv, D].
    """
    kernels = triton_backend()
    if kernels is None:
        return "needs the package triton, which is not installed"
    reason: str | None = kernels.unsupported(tensor, k_cache)
    return reason


def run_decode(inputs: DecodeInputs, backend: str) -> tuple[Tensor, Tensor | None]:
    """Output of ``decode_attention`` for checked inputs, and its page scores if asked for."""
    check_reach(
        inputs.seq_lens, inputs.block_table.shape[1] * inputs.k_cache.shape[1], "block_table"
    )
    chosen = _choose(backend, inputs.q, inputs.k_cache)
    if chosen is not torch_backend and chosen is not reference and needs_gradients(inputs):
        if backend == "triton":
            raise OperationError(
                "backend 'triton' computes no gradients, got an input that requires them; use "
                "backend 'torch', or torch.no_grad()"
            )
        chosen = torch_backend
    out: Tensor
    scores: Tensor | None
    if inputs.q.dim() != 4 or chosen not in (torch_backend, reference):
        out, scores = chosen.decode_attention(inputs)
        return out, scores
    at_once = torch_backend.verify_attention(inputs) if chosen is torch_backend else None
    if at_once is not None:
        out, scores = at_once
    else:
        out, scores = chosen.decode_attention(each_token_alone(inputs))
        out = out.view(inputs.q.shape)
        if scores is not None:
            scores = scores.view(*inputs.q.shape[:2], scores.shape[1])
    if scores is not None and inputs.score_last:
        scores = scores[:, -1]
    return out, scores


def plan_decode(
    inputs: DecodeInputs,
    cfg: DeltaConfig | None = None,
    compile_rows: int = 0,
    q_dtype: dtype | None = None,
    over_all_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """Plan the kernels of one layer for every later step of the same shapes.

    Parameters
    ----------
    inputs : DecodeInputs
        Those of one step. Shapes, strides, types and numbers count, and are checked here only.
    cfg : DeltaConfig, optional
        Given for a layer that selects, whose inputs ask for page scores. Without it, a plan of
        inputs that ask for them writes scores where each run says.
    compile_rows : int
        Compile now what batches of up to so many rows need.
    q_dtype : dtype, optional
        Of the q that steps have, where it is float8; the q of ``inputs`` has the output's dtype.
    over_all_ranks : callable, optional
        Of a Δ-layer whose query heads are on several ranks: maximum over all of them of float32
        numbers, s_t of every token of the table. It may overwrite what it gets.

    Returns
    -------
    DecodePlan or None
        Of :mod:`deltadecode.ops.triton.decode`; None where kernels do not compute this at once, and
        :func:`deltadecode.ops.decode_attention` does it.

    Raises
    ------
    OperationError
        As :func:`deltadecode.ops.decode_attention` does.
    """
    check_numbers(inputs)
    check_decode(inputs)
    kernels = triton_backend()
    if inputs.k_scales is not None:
        return None
    if kernels is None or kernels_refuse(inputs.q, inputs.k_cache) or needs_gradients(inputs):
        return None
    return kernels.plan_decode(inputs, cfg, compile_rows, q_dtype, over_all_ranks)


def compile_selections(cfg: DeltaConfig, rows: Iterable[int], pages: int, device: device) -> None:
    """Compile now what :func:`deltadecode.ops.select_pages` runs on a GPU.

    Parameters
    ----------
    cfg : DeltaConfig
        As there.
    rows, pages : iterable of int, int
        Numbers of rows, and the width of their float32 page scores.
    device : torch.device
        Where they will be; on others than GPUs nothing is compiled.
    """
    kernels = triton_backend()
    if kernels is not None and device.type == "cuda":
        kernels.compile_selections(cfg, rows, pages)


def run_index(
    q: Tensor, keys: Tensor, block_table: Tensor, seq_lens: Tensor, scale: float, backend: str
) -> Tensor:
    """Scores of ``index_scores`` for checked inputs."""
    check_reach(seq_lens, block_table.shape[1] * keys.shape[1], "block_table")
    scores: Tensor = _choose(backend, q).index_scores(q, keys, block_table, seq_lens, scale)
    return scores


def run_select(
    page_scores: Tensor, seq_lens: Tensor, cfg: DeltaConfig, backend: str
) -> tuple[Tensor, Tensor]:
    """Page ids and counts of ``select_pages`` for checked inputs."""
    check_reach(seq_lens, page_scores.shape[-1] * cfg.page_size, "page_scores")
    chosen = _choose(backend, page_scores)
    by_row = page_scores.dim() == 3 and chosen in (torch_backend, reference)
    if not by_row:
        page_ids, page_counts = chosen.select_pages(page_scores, seq_lens, cfg)
        return page_ids, page_counts
    rows, tokens = page_scores.shape[:2]
    lengths = token_lengths(seq_lens, tokens).flatten()
    page_ids, page_counts = chosen.select_pages(page_scores.flatten(0, 1), lengths, cfg)
    return page_ids.view(rows, tokens, page_ids.shape[1]), page_counts.view(rows, tokens)


def _choose(backend: str, tensor: Tensor, k_cache: Tensor | None = None) -> ModuleType:
    """Module that computes an operation, given its first inputs."""
    if backend == "reference":
        return reference
    if backend == "torch" or (backend == "auto" and not tensor.is_cuda):
        return torch_backend
    if backend not in ("auto", "triton"):
        raise OperationError(
            f"backend must be 'auto', 'reference', 'torch' or 'triton', got {backend!r}"
        )
    reason = kernels_refuse(tensor, k_cache)
    if reason is None:
        kernels = triton_backend()
        assert kernels is not None
        return kernels
    if backend == "triton":
        raise OperationError(f"backend 'triton' {reason}")
    return torch_backend


@functools.cache
def triton_backend() -> ModuleType | None:
    """The kernels, imported when first asked for; None without Triton."""
    try:
        return importlib.import_module("deltadecode.ops.triton")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None
