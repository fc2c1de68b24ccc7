"""One decode step of one layer, the same in every serving engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltadecode.config import Role
from deltadecode.engines.serving.settings import ServingSettings
from deltadecode.errors import DeltaConfigError
from deltadecode.ops import Scratch, decode_attention, select_pages


@dataclass
class ForwardPass:
    """What the layers of one forward pass share, and what ends with it (R1).

    Attributes
    ----------
    selections : dict
        Δ-layer -> page ids and counts.
    scratch : Scratch
        Memory of the kernels.
    waiting : WaitingScores or None
        In lossless mode, page scores that layers have written and nobody has selected by.
    """

    selections: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    scratch: Scratch = field(default_factory=Scratch)
    waiting: WaitingScores | None = None


@dataclass
class WaitingScores:
    """Page scores of layers that follow each other, for one selection of all of them.

    Attributes
    ----------
    scores : Tensor
        [layers, B, pages] float32.
    first : int
        The first layer's place among those that select.
    count : int
        Layers that have written theirs.
    """

    scores: Tensor
    first: int
    count: int = 0


@dataclass(frozen=True)
class Cache:
    """Where the decode rows' keys and values are; see :func:`deltadecode.ops.decode_attention`."""

    k: Tensor
    v: Tensor
    block_table: Tensor
    seq_lens: Tensor


def attend(
    settings: ServingSettings,
    layer: int,
    role: Role,
    q: Tensor,
    cache: Cache,
    forward: ForwardPass,
    *,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    prompts: Tensor | None = None,
    idle: Tensor | None = None,
    over_all_ranks: Callable[[Tensor], Tensor] | None = None,
    score_last: bool = False,
    source: int | None = None,
) -> Tensor:
    """Attention of the decode rows in one layer: q [B, Hq, D] or [B, Q, Hq, D] to the same.

    ``layer`` is the model's own number. A Δ-layer adds to the selections of ``forward``. A sparse
    layer reads those of ``source``, by default its Δ-layer's, and raises DeltaConfigError if there
    are none. Other layers read every page. ``scale``, ``sinks``, ``softcap``, ``k_scale`` and
    ``v_scale`` are those of :func:`deltadecode.ops.decode_attention`, ``prompts`` those of
    :class:`deltadecode.engines.serving.rows.Rows`, ``idle`` [B, Q] marks queries that count for
    nothing. ``over_all_ranks`` gives the maximum of s_t over tensor-parallel ranks, for
    ``sync_heads``. With ``score_last`` a Δ-layer selects by the last of a row's tokens only.
    """
    page_size = settings.config.page_size
    operation = functools.partial(
        decode_attention, q, cache.k, cache.v, cache.block_table, cache.seq_lens,
        scale=scale, sinks=sinks, softcap=softcap, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    out: Tensor
    if role == "sparse":
        source = settings.plan.source(layer) if source is None else source
        ids, counts = find_selection(forward, layer, source)
        out = operation(page_size=page_size, page_ids=ids, page_counts=counts)
        return out
    if role != "delta":
        out = operation(page_size=page_size)
        return out
    operation = functools.partial(operation, return_page_scores=True, score_last=score_last)
    scores: Tensor
    if settings.sync_heads and over_all_ranks is not None:
        out, token_scores = operation(page_size=1)
        scores = over_all_ranks(token_scores).unflatten(-1, (-1, page_size)).sum(-1)
    else:
        out, scores = operation(page_size=page_size)
    ids, counts = select_pages(scores, cache.seq_lens, settings.config)
    keep_selection(settings, forward, layer, ids, counts, cache.seq_lens, prompts, idle)
    return out


def keep_selection(
    settings: ServingSettings,
    forward: ForwardPass,
    layer: int,
    ids: Tensor,
    counts: Tensor,
    seq_lens: Tensor,
    prompts: Tensor | None,
    idle: Tensor | None,
) -> None:
    """Keep what a Δ-layer has selected, with every page for those that read all (R1).

    Arguments are as in :func:`attend`.
    """
    short = find_short(settings, seq_lens, counts)
    if short is not None:
        counts.masked_fill_(short, -1)
    if prompts is not None:
        flags = prompts[: counts.shape[0]]
        counts.masked_fill_(flags if counts.dim() == 1 else flags[:, None], -1)  # every page
    if idle is not None:
        counts.masked_fill_(idle, 0)
    forward.selections[layer] = ids, counts


def find_short(settings: ServingSettings, seq_lens: Tensor, counts: Tensor) -> Tensor | None:
    """Which decode steps see fewer than ``min_tokens``; shaped like ``counts``, [B] or [B, Q].

    It follows from a row's own length alone, so no row depends on others of its batch (R6). None
    where nothing is to be changed: padding rows see no tokens, and keep their counts.
    """
    if not settings.reads_more_when_short:
        return None
    seen = seq_lens
    if counts.dim() == 2:
        queries = counts.shape[1]
        seen = seq_lens[:, None] + torch.arange(1 - queries, 1, device=seq_lens.device)
    return (seen > 0) & (seen < settings.min_tokens)


def find_selection(forward: ForwardPass, layer: int, source: int | None) -> tuple[Tensor, Tensor]:
    """Page ids and counts that a sparse layer reads."""
    selection = None if source is None else forward.selections.get(source)
    if selection is None:
        raise DeltaConfigError(
            f"sparse layer {layer} needs Δ-layer {source} before it in the same forward pass"
        )
    return selection
