"""Scores over the tensor-parallel ranks, through vLLM's own communicators."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.distributed import ReduceOp
from vllm.distributed import get_tp_group


def over_all_ranks() -> Callable[[Tensor], Tensor] | None:
    """What ``sync_heads`` needs of the engine: None where there is one rank."""
    return largest_over_ranks if get_tp_group().world_size > 1 else None


def largest_over_ranks(scores: Tensor) -> Tensor:
    """Maximum over the ranks of contiguous ``scores``, which it may overwrite; exact.

    vLLM's all-reduce only adds. What it adds large tensors with on GPUs takes maxima as well, and
    goes into CUDA graphs as it is. Elsewhere, and without NCCL, the scores of all ranks are read.
    """
    group = get_tp_group()
    nccl = getattr(group.device_communicator, "pynccl_comm", None)
    if nccl is None or nccl.disabled:
        every: Tensor = group.all_gather(scores[None], dim=0)
        return every.amax(0)
    nccl.all_reduce(scores, scores, op=ReduceOp.MAX)
    return scores
