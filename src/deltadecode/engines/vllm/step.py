"""One decode step of one layer, the same on every platform.

Pages are selected by a Δ-layer and read by the layers after it within one forward pass; they live
in vLLM's context of that pass and end with it (R1).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context

from deltadecode.engines.vllm.settings import Settings
from deltadecode.errors import DeltaConfigError
from deltadecode.ops import decode_attention, select_pages

_PAGES = "deltadecode_pages"


@dataclass
class Rows:
    """How a batch divides.

    Attributes
    ----------
    decode : int
        Rows of one new token, which come first; a padding row of a CUDA graph counts.
    prefill : object or None
        Stock metadata of the other rows; None when the stock metadata of the whole batch is theirs,
        or there are none.
    prompts : Tensor or None
        Boolean, at least as many as there are decode rows: those whose token is the last of a
        prompt, which a chunk or a prefix hit has left alone. They are prefill (R1).
    block_table, seq_lens : Tensor or None
        Of the decode rows with padding rows of no tokens after them; None when there are none.
    """

    decode: int
    prefill: Any = None
    prompts: Tensor | None = None
    block_table: Tensor | None = None
    seq_lens: Tensor | None = None


@dataclass(frozen=True)
class Cache:
    """Where the decode rows' keys and values are; see :func:`deltadecode.ops.decode_attention`."""

    k: Tensor
    v: Tensor
    block_table: Tensor
    seq_lens: Tensor


def most_rows(vllm_config: Any) -> int:
    """Most decode rows of a batch, padding rows included.

    Parameters
    ----------
    vllm_config : vllm.config.VllmConfig
        Of the engine.

    Returns
    -------
    int
    """
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return padded(max(vllm_config.scheduler_config.max_num_seqs, captured))


def padded(count: int) -> int:
    """Rows that a number of rows of a mixed batch is rounded up to.

    Parameters
    ----------
    count : int
        At least 1.

    Returns
    -------
    int
        Among the sizes that CUDA graphs are captured for.
    """
    if count <= 4:
        return 1 << (count - 1).bit_length()
    step = 8 if count <= 256 else 16
    return -(-count // step) * step


class PromptRows:
    """Which rows of one new token belong to prompts, where a captured graph finds it.

    Parameters
    ----------
    rows : int
        Most rows of a batch, padding included.
    device : torch.device
        Of the batch.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._flags = torch.zeros(rows, dtype=torch.bool, device=device)
        self._any = False

    def update(self, common: Any, count: int, told: Any = None) -> Tensor:
        """Flags of a batch; nothing is sent to the device where no row is flagged, as usual.

        Parameters
        ----------
        common : CommonAttentionMetadata
            Of the batch.
        count : int
            Its decode rows.
        told : ndarray, optional
            [requests] bool, in place of what the metadata says.

        Returns
        -------
        Tensor
            [rows] bool, always the same memory.
        """
        found = getattr(common, "is_prefilling", None) if told is None else torch.from_numpy(told)
        # Padding rows may be left out of it.
        found = torch.zeros(0, dtype=torch.bool) if found is None else found[:count]
        if not found.is_cpu:
            # Some versions may keep it on the device; asking it would wait for the device.
            self._flags.zero_()
            self._flags[: len(found)] = found
            return self._flags
        some = bool(found.any())
        if some or self._any:
            # From memory that is not pinned: it is read before the call returns.
            flags = torch.zeros(self._flags.shape, dtype=torch.bool)
            flags[: len(found)] = found
            self._flags.copy_(flags)
        self._any = some
        return self._flags


def count_decode_rows(common: Any) -> int:
    """Rows before the first one with more than one new token.

    Parameters
    ----------
    common : CommonAttentionMetadata
        Of a batch, padded or not.

    Returns
    -------
    int
    """
    rows = min(common.num_reqs, common.num_actual_tokens)
    if common.max_query_len <= 1:
        return int(rows)
    starts = common.query_start_loc_cpu[: common.num_reqs + 1].numpy()
    return int(((starts[1:] - starts[:-1]) == 1).cumprod().sum())


def narrow_table(block_table: Tensor, block_size: int, longest: int) -> Tensor:
    """Only the columns that a batch reaches, where that costs nothing.

    Parameters
    ----------
    block_table : Tensor
        [B, blocks of the longest sequence that the engine takes].
    block_size : int
        Tokens of a block.
    longest : int
        Tokens of the longest row.

    Returns
    -------
    Tensor
        On a GPU the table itself: a captured graph's rows may outgrow this batch, and kernels are
        compiled for a number of splits, which follows from the width.
    """
    if block_table.is_cuda:
        return block_table
    return block_table[:, : max(1, -(-longest // block_size))]


def pad_rows(rows: Rows, metadata: Any) -> None:
    """Round the decode rows of a mixed batch up to a size that CUDA graphs are captured for.

    Such a batch runs outside of graphs, and without this every number of rows would compile kernels
    of its own while requests wait.

    Parameters
    ----------
    rows : Rows
        Of the batch; gets a table and lengths of its own.
    metadata
        Stock metadata of the batch.
    """
    count = rows.decode
    size = padded(count)
    if size > metadata.num_actual_tokens or size == count:
        return
    more = size - count
    rows.block_table = torch.nn.functional.pad(metadata.block_table[:count], (0, 0, 0, more))
    rows.seq_lens = torch.nn.functional.pad(metadata.seq_lens[:count], (0, more))


def attend(
    settings: Settings,
    layer: int,
    q: Tensor,
    cache: Cache,
    prompts: Tensor | None,
    *,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Attention of the decode rows in a Δ- or sparse layer.

    Parameters
    ----------
    settings : Settings
        Of the model.
    layer : int
        The model's number of the layer.
    q : Tensor
        [B, Hq, D].
    cache : Cache
        Of the layer.
    prompts : Tensor or None
        See :class:`Rows`.
    scale, sinks, softcap
        See :func:`deltadecode.ops.decode_attention`.

    Returns
    -------
    Tensor
        [B, Hq, D].

    Raises
    ------
    DeltaConfigError
        When the layer's Δ-layer has not run in this forward pass.
    """
    pages: dict[int, tuple[Tensor, Tensor]] = vars(get_forward_context()).setdefault(_PAGES, {})
    page_size = settings.config.page_size
    operation = functools.partial(
        decode_attention, q, cache.k, cache.v, cache.block_table, cache.seq_lens,
        scale=scale, sinks=sinks, softcap=softcap,
    )  # fmt: skip
    source = settings.plan.source(layer)
    out: Tensor
    if source is not None:
        if source not in pages:
            raise DeltaConfigError(
                f"sparse layer {layer} needs Δ-layer {source} before it in the same forward pass"
            )
        ids, counts = pages[source]
        out = operation(page_size=page_size, page_ids=ids, page_counts=counts)
        return out
    unit = 1 if settings.sync_heads else page_size
    scores: Tensor
    out, scores = operation(page_size=unit, return_page_scores=True)
    if settings.sync_heads:
        scores = _over_all_ranks(scores).unflatten(1, (-1, page_size)).sum(-1)
    ids, counts = select_pages(scores, cache.seq_lens, settings.config)
    if prompts is not None:
        counts.masked_fill_(prompts[: counts.shape[0]], -1)  # every page
    pages[layer] = ids, counts
    return out


def _over_all_ranks(token_scores: Tensor) -> Tensor:
    """s_t over the query heads of every rank: a maximum of maxima is exact."""
    group = get_tp_group()
    if group.world_size > 1:
        torch.distributed.all_reduce(
            token_scores, op=torch.distributed.ReduceOp.MAX, group=group.device_group
        )
    return token_scores
