"""Decode attention of others: FlashAttention-3 as vLLM calls it, FlashInfer, and ``torch.topk``.

An adapter sets up what its engine sets up once per step, outside of what is timed, and gives one
call per input set.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.cases import BLOCK_SIZE, CFG, DIM
from benchmarks.kernels.inputs import SCALE, Inputs
from benchmarks.kernels.timing import Call
from benchmarks.report import reason

TOPK = "torch.topk + sort"
# vLLM's default for decoding in full CUDA graphs (flash_attn_max_num_splits_for_cuda_graph).
_FA3_SPLITS = 32
_FLASHINFER_WORKSPACE = 256 * 2**20


class FlashAttention3:
    """FlashAttention-3 out of vLLM, called as vLLM's backend calls it to decode."""

    name = "FlashAttention-3"
    ops: tuple[str, ...] = ("dense", "sparse")

    def __init__(self) -> None:
        # Its log goes to stdout, where only the result belongs.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import vllm_flash_attn

        if not vllm_flash_attn.is_fa_version_supported(3):
            raise RuntimeError(vllm_flash_attn.fa_version_unsupported_reason(3))
        self._attend: Callable[..., Any] = vllm_flash_attn.flash_attn_varlen_func
        self._schedule: Callable[..., Any] = vllm_flash_attn.get_scheduler_metadata

    def calls(self, op: str, inputs: Inputs) -> list[Call]:
        """Prepare calls; for sparse ones, the selected blocks are the block table."""
        shape = inputs.shape
        if op == "dense":
            longest = shape.context
            sets = [(*cache, inputs.block_table, inputs.seq_lens) for cache in inputs.caches]
        else:
            longest = min(shape.context, CFG.budget_pages * CFG.page_size)
            sets = [
                (*inputs.caches[number], chosen.blocks, chosen.tokens)
                for number, chosen in inputs.sparse
            ]
        starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=inputs.q.device)
        # Once per step in vLLM, and shared by all its layers.
        schedules = {
            id(lens): self._schedule(
                batch_size=shape.batch, max_seqlen_q=1, max_seqlen_k=longest,
                num_heads_q=shape.heads, num_heads_kv=shape.kv_heads, headdim=DIM,
                cache_seqlens=lens, qkv_dtype=inputs.q.dtype, cu_seqlens_q=starts,
                page_size=BLOCK_SIZE, causal=True, window_size=(-1, -1), num_splits=_FA3_SPLITS,
            )
            for lens in {id(one[3]): one[3] for one in sets}.values()
        }  # fmt: skip
        return [
            partial(
                self._attend, q=inputs.q, k=keys, v=values, out=torch.empty_like(inputs.q),
                cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=lens, max_seqlen_k=longest,
                softmax_scale=SCALE, causal=True, block_table=table,
                scheduler_metadata=schedules[id(lens)], fa_version=3, num_splits=_FA3_SPLITS,
            )
            for keys, values, table, lens in sets
        ]  # fmt: skip


class FlashInfer:
    """FlashInfer's batched paged decoding, on tensor cores since query heads share KV heads."""

    name = "FlashInfer"
    ops: tuple[str, ...] = ("dense",)

    def __init__(self) -> None:
        import flashinfer

        self._wrapper: Callable[..., Any] = flashinfer.BatchDecodeWithPagedKVCacheWrapper
        self._workspace: Tensor | None = None

    def calls(self, op: str, inputs: Inputs) -> list[Call]:
        """Plan, which FlashInfer does on the host, and prepare one call per cache."""
        shape, device = inputs.shape, inputs.q.device
        if self._workspace is None:
            # It has to be zero when it is first used, and serves every shape.
            self._workspace = torch.zeros(_FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device)
        indices = inputs.block_table.flatten()
        row_blocks = inputs.block_table.shape[1]
        starts = torch.arange(shape.batch + 1, dtype=torch.int32) * row_blocks
        last = shape.context - (row_blocks - 1) * BLOCK_SIZE
        last_lens = torch.full((shape.batch,), last, dtype=torch.int32)
        wrapper = self._wrapper(
            self._workspace, "NHD", use_cuda_graph=True, use_tensor_cores=True,
            paged_kv_indptr_buffer=torch.empty_like(starts, device=device),
            paged_kv_indices_buffer=torch.empty_like(indices),
            paged_kv_last_page_len_buffer=torch.empty_like(last_lens, device=device),
        )  # fmt: skip
        wrapper.plan(
            starts, indices, last_lens, shape.heads, shape.kv_heads, DIM, BLOCK_SIZE,
            q_data_type=inputs.q.dtype, kv_data_type=inputs.q.dtype, sm_scale=SCALE,
        )  # fmt: skip
        return [
            partial(wrapper.run, inputs.q, cache, out=torch.empty_like(inputs.q))
            for cache in inputs.caches
        ]


# Each has a name, and says which of "dense" and "sparse" it runs.
Peer = FlashAttention3 | FlashInfer


def find_peers() -> tuple[list[Peer], dict[str, str]]:
    """Load the peers that are there; for the others, name -> why it does not run, in one line."""
    peers: list[Peer] = []
    missing: dict[str, str] = {}
    for make in (FlashAttention3, FlashInfer):
        try:
            peers.append(make())
        except Exception as error:  # what an import of compiled code can raise has no bounds
            missing[make.name] = reason(error)
    return peers, missing


def topk_select(page_scores: Tensor) -> Tensor:
    """Select pages with PyTorch's own operations, of rows that all have the same length.

    Page scores [B, N]; gives [B, min(N, K)] int32, ascending: the last L pages and the best of the
    others.
    """
    pages = page_scores.shape[1]
    scores = page_scores.clone()
    scores[:, max(0, pages - CFG.recent_pages) :] = torch.inf
    best = scores.topk(min(pages, CFG.budget_pages), dim=1, sorted=False)
    return best.indices.sort(dim=1).values.to(torch.int32)
