"""Fast backend in plain PyTorch, tuned on CPUs; it runs on any device, with host synchronisation.

Decoding is bound by reading keys and values, so nothing here copies them more than once: query
heads that share a KV head are the rows of one matrix (no repeated KV heads), a row that lies in
one block is a view, and a sparse layer gathers whole pages. Rows of equal length go through as
one batch. Contracts stand in :mod:`deltadecode.ops.operations`, the definition in
:mod:`deltadecode.ops.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.errors import OperationError
from deltadecode.ops import reference
from deltadecode.ops.inputs import DecodeInputs

# Half precision keys and values are made float32 for exact page scores, this many elements (1 MiB)
# at a time: they stay in the cache of a core, and need no memory to speak of. Measured: as fast as
# converting all at once.
_UPCAST_ELEMENTS = 1 << 18


def select_pages(page_scores: Tensor, seq_lens: Tensor, cfg: DeltaConfig) -> tuple[Tensor, Tensor]:
    """Select pages (R3, R4); see :func:`deltadecode.ops.select_pages`."""
    recent, sinks, width = cfg.recent_pages, cfg.sink_pages, cfg.table_width(page_scores.shape[1])
    used = (seq_lens + (cfg.page_size - 1)).div_(cfg.page_size, rounding_mode="floor")
    pages: list[int] = used.tolist()
    budgets = {cfg.pages_for(row) for row in pages}
    if len(budgets) > 1:
        each = [
            select_pages(page_scores[row : row + 1], seq_lens[row : row + 1], cfg)
            for row in range(len(pages))
        ]
        return torch.cat([ids for ids, _ in each]), torch.cat([counts for _, counts in each])
    budget = budgets.pop() if budgets else cfg.budget_pages
    counts = used.clamp(max=budget)
    most = max(pages, default=0)
    page = torch.arange(most, dtype=torch.int32, device=page_scores.device)
    if most <= budget:
        page_ids = page.where(page < counts[:, None], -1)
        return F.pad(page_ids, (0, width - most), value=-1), counts

    end = used[:, None]
    forced = (page < sinks) | (page >= end - recent)
    scores = page_scores[:, :most].masked_fill(forced, float("-inf"))
    wanted = budget - recent - sinks
    top = scores.topk(wanted + 1, dim=1)
    for row, largest in enumerate(top.values.tolist()):
        # topk puts NaN first, and equals in any order (such as -inf, which forced pages have here).
        doubtful = math.isnan(largest[0]) or largest[-1] == largest[-2]
        if doubtful and pages[row] > budget:
            return reference.select_pages(page_scores, seq_lens, cfg)
    last = end - recent + page[:recent]
    chosen = top.indices[:, :wanted].int()
    page_ids = torch.cat([page[:sinks].expand(len(pages), -1), chosen, last], dim=1).sort(1).values
    if min(pages) <= budget:
        place = page[:budget]
        page_ids = page_ids.where(end > budget, place.where(place < end, -1))
    if budget < width:
        page_ids = F.pad(page_ids, (0, width - budget), value=-1)
    return page_ids, counts


def index_scores(
    q: Tensor, keys: Tensor, block_table: Tensor, seq_lens: Tensor, scale: float
) -> Tensor:
    """Score every token; see :func:`deltadecode.ops.index_scores`."""
    rows, blocks = block_table.shape
    lengths, table = seq_lens.tolist(), block_table.tolist()
    width = max(lengths, default=0)
    out = q.new_zeros((rows, blocks * keys.shape[1]), dtype=_exact(q.dtype))
    if blocks == 1 and [block for (block,) in table] == list(range(rows)):
        # Each row in a block of its own, in order: all of them at once.
        scores = torch.bmm(keys[:rows, :width].to(out.dtype), q[:, :, None].to(out.dtype))
        out[:, :width] = scores[..., 0] * scale
        return out
    for row, length in enumerate(lengths):
        k = keys[block_table[row, : -(-length // keys.shape[1])].long()].flatten(0, 1)[:length]
        out[row, :length] = k.to(out.dtype) @ q[row].to(out.dtype) * scale
    return out


def verify_attention(inputs: DecodeInputs) -> tuple[Tensor, Tensor | None] | None:
    """Attend to all tokens with the Q tokens [B, Q, Hq, D] of each row, which read the cache once.

    Output like q, and page scores [B, Q, pages] if asked for. None where rows differ in length, lie
    in no one block, read pages, or have scales of tokens: each token then attends alone.
    """
    q, table = inputs.q, inputs.block_table
    rows, tokens, heads, dim = q.shape
    block_size, kv_heads = inputs.k_cache.shape[1:3]
    lengths, first = inputs.seq_lens.tolist(), table[:, 0].tolist()
    if (
        inputs.page_ids is not None
        or inputs.k_scales is not None
        or len(set(lengths)) != 1
        or not tokens <= lengths[0] <= block_size
        or first != list(range(first[0], first[0] + rows))
    ):
        return None
    k = _first_tokens(inputs.k_cache, table, first[0], lengths[0]).to(q.dtype)
    v = _first_tokens(inputs.v_cache, table, first[0], lengths[0]).to(q.dtype)
    group = heads // kv_heads
    # The tokens of a query head are query heads of their own, which see less and less.
    packed = q.reshape(rows, tokens, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    sinks = None if inputs.sinks is None else inputs.sinks.repeat_interleave(tokens)
    out, alpha = _attend_explicitly(
        packed.reshape(rows, kv_heads, group * tokens, dim), k, v,
        inputs.scale * inputs.k_scale, sinks, inputs.softcap, tokens,
    )  # fmt: skip
    out = out.view(rows, kv_heads, group, tokens, dim).permute(0, 3, 1, 2, 4).reshape(q.shape)
    if inputs.v_scale != 1.0:
        out = out * inputs.v_scale
    if not inputs.return_page_scores:
        return out, None
    largest = alpha.view(rows, heads, tokens, -1).amax(dim=1).flatten(0, 1)[:, None, None]
    pages = table.shape[1] * block_size // inputs.page_size
    return out, _sum_over_pages(largest, inputs.page_size, pages).view(rows, tokens, pages)


def decode_attention(inputs: DecodeInputs) -> tuple[Tensor, Tensor | None]:
    """Attend with one query token per sequence; see :func:`deltadecode.ops.decode_attention`."""
    q, page_size, page_ids = inputs.q, inputs.page_size, inputs.page_ids
    k_cache, v_cache, block_table = inputs.k_cache, inputs.v_cache, inputs.block_table
    rows, heads, dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    lengths: list[int] = inputs.seq_lens.tolist()
    attended = lengths
    if page_ids is not None and inputs.page_counts is not None:
        attended = _attended(page_ids, inputs.page_counts.tolist(), lengths, page_size)
    first = [row[0] if row else 0 for row in block_table[:, :1].tolist()]
    queries = q.reshape(rows, kv_heads, heads // kv_heads, dim)
    pages = block_table.shape[1] * block_size // page_size
    scored, scale = inputs.return_page_scores, inputs.scale * inputs.k_scale
    scales = _scales(inputs)
    explicit = scored or bool(scales) or inputs.sinks is not None or inputs.softcap is not None

    outs, scores = [], []
    for start, stop in _batches(lengths, attended, first, block_size):
        whole = stop - start == rows
        part = queries if whole else queries[start:stop]
        tokens = attended[start]
        if tokens == 0:
            outs.append(torch.zeros_like(part))
            scores.append(q.new_zeros((stop - start, pages), dtype=_exact(q.dtype)))
            continue
        table = block_table if whole else block_table[start:stop]
        if page_ids is None or tokens == lengths[start]:
            k, v, *of_tokens = (
                _first_tokens(cache, table, first[start], tokens)
                for cache in (k_cache, v_cache, *scales)
            )
        else:
            chosen = page_ids[start:stop, : -(-tokens // page_size)]
            both = gather_pages((k_cache, v_cache), table, chosen, page_size)
            both += gather_pages(scales, table, chosen, page_size) if scales else []
            k, v, *of_tokens = (part[:, :, :tokens] for part in both)
        if k.dtype != q.dtype and not scales:
            k, v = k.to(q.dtype), v.to(q.dtype)
        if explicit:
            out, alpha = _attend_explicitly(
                part, k, v, scale, inputs.sinks, inputs.softcap, of_tokens=of_tokens
            )
            outs.append(out)
            if scored:
                scores.append(_sum_over_pages(alpha, page_size, pages))
        else:
            outs.append(_attend(part, k, v, scale))
    result = _join(outs, queries).reshape(q.shape)
    if inputs.v_scale != 1.0:
        result = result * inputs.v_scale
    if not scored:
        return result, None
    return result, _join(scores, q.new_zeros((0, pages), dtype=_exact(q.dtype)))


def _scales(inputs: DecodeInputs) -> tuple[Tensor, ...]:
    """Scales of tokens as caches of heads of one number; none without them."""
    if inputs.k_scales is None or inputs.v_scales is None:
        return ()
    return inputs.k_scales[..., None], inputs.v_scales[..., None]


def _attended(page_ids: Tensor, counts: list[int], lengths: list[int], page_size: int) -> list[int]:
    """Tokens on the selected pages of each row; only the last page can be partial."""
    tokens = []
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        if count <= 0 or length == 0:
            tokens.append(length if count < 0 else 0)
            continue
        beyond = (int(page_ids[row, count - 1]) + 1) * page_size - length
        tokens.append(count * page_size - max(0, beyond))
    return tokens


def _batches(
    lengths: list[int], attended: list[int], first: list[int], block_size: int
) -> list[tuple[int, int]]:
    """Ranges of rows that can share one call: all of them or one by one."""
    rows = len(lengths)
    alike = len(set(lengths)) == 1 and len(set(attended)) == 1
    if alike and attended[0] == lengths[0]:
        # Reading whole prefixes in place needs each row in one block, and those in order.
        alike = lengths[0] <= block_size and first == list(range(first[0], first[0] + rows))
    return [(0, rows)] if alike else [(row, row + 1) for row in range(rows)]


def _first_tokens(cache: Tensor, table: Tensor, first: int, tokens: int) -> Tensor:
    """First tokens of each row, [R, Hkv, tokens, D]; a view where they lie in one block."""
    blocks, block_size, kv_heads, dim = cache.shape
    if tokens > block_size:
        used = table[0, : -(-tokens // block_size)]
        # An index in brackets takes three times as long where keys lie beside values.
        return cache.index_select(0, used).flatten(0, 1)[:tokens].transpose(0, 1)[None]
    rows = len(table)
    if not 0 <= first <= blocks - rows:
        raise OperationError(f"block_table must name blocks in 0..{blocks - 1}, got {first}")
    by_block, by_token, by_head, _ = cache.stride()
    # One call instead of three: at short lengths the calls are what takes the time.
    return cache.as_strided(
        (rows, kv_heads, tokens, dim),
        (by_block, by_head, by_token, 1),
        cache.storage_offset() + first * by_block,
    )


def gather_pages(
    caches: tuple[Tensor, ...], table: Tensor, page_ids: Tensor, page_size: int
) -> list[Tensor]:
    """Tokens of the given pages [R, K] of each row, [R, Hkv, K * P, D], of caches of one shape."""
    blocks, block_size, kv_heads, dim = caches[0].shape
    rows, count = page_ids.shape
    per_block = block_size // page_size
    if table.shape[1] == 1:
        block, page = table, page_ids
    else:
        place = page_ids.div(per_block, rounding_mode="floor")
        block, page = table.gather(1, place.long()), page_ids - place * per_block

    gathered = []
    index, of_index = None, None
    for cache in caches:
        # Where a head's tokens follow each other in memory, a page of a head is one run of P * D
        # elements, and all runs of all rows and heads are copied by one call.
        run = page_size * dim
        by_block, by_token, by_head = cache.stride()[:3]
        by_block = 0 if blocks == 1 else by_block
        by_head = 0 if kv_heads == 1 else by_head
        if by_token != dim or by_block % run or by_head % run:
            paged = cache.view(blocks, per_block, page_size, kv_heads, dim)
            gathered.append(paged[block, page].permute(0, 3, 1, 2, 4).flatten(2, 3))
            continue
        by_block, by_head = by_block // run, by_head // run
        if index is None or of_index != (by_block, by_head):
            of_index = by_block, by_head
            step = max(by_head, 1)
            head = torch.arange(0, kv_heads * step, step, dtype=torch.int32, device=cache.device)
            index = ((block * by_block + page)[:, None] + head[:, None]).flatten()
        runs = (blocks - 1) * by_block + (kv_heads - 1) * by_head + per_block
        copied = cache.as_strided((runs, run), (run, 1)).index_select(0, index)
        gathered.append(copied.view(rows, kv_heads, count * page_size, dim))
    return gathered


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Plain attention; q and result [R, Hkv, G, D], k and v [R, Hkv, T, D]."""
    rows, kv_heads, group, dim = q.shape
    tokens = k.shape[2]
    if rows * kv_heads == 1 and group % 2 == 0 and q.dtype == torch.float32 and q.is_cpu:
        # One (row, head) is one task, which leaves the other cores idle: read the keys twice.
        # Half precision does not gain, since each task converts all keys for itself.
        shape = (1, 2, tokens, dim)
        halves = q.view(1, 2, group // 2, dim)
        out = F.scaled_dot_product_attention(halves, k.expand(shape), v.expand(shape), scale=scale)
        return out.reshape(q.shape)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _attend_explicitly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
    tokens: int = 1,
    of_tokens: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Attention that returns its weights too, [R, Hkv, G, T] float32, and knows sinks and softcap.

    Heads are those of the last ``tokens`` tokens in turn, each of which sees none behind itself.
    ``of_tokens`` are scales of keys and of values, [R, Hkv, T, 1] each, or none.
    Stays in float32 from q to the output, whatever the input: the choice of pages hangs on it.
    """
    dtype = _exact(q.dtype)
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    limit = _UPCAST_ELEMENTS if q.is_cpu else _UPCAST_ELEMENTS << 6  # fewer launches on a GPU
    parts = 1 if k.dtype == dtype else -(-k.numel() // limit)
    size = -(-k.shape[2] // parts)
    scaled = q.flatten(0, 1).to(dtype) * scale
    pieces = [slice(start, start + size) for start in range(0, k.shape[2], size)]
    parted = [torch.bmm(scaled, keys[:, piece].to(dtype).transpose(1, 2)) for piece in pieces]
    logits = _join(parted, scaled, dim=2)
    k_scales, v_scales = [one.to(dtype).flatten(0, 1).mT for one in of_tokens] or (None, None)
    if k_scales is not None:
        logits *= k_scales
    if softcap is not None and logits.requires_grad:
        logits = torch.tanh(logits / softcap) * softcap  # autograd keeps the tanh
    elif softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    if tokens > 1:
        behind = torch.ones(tokens, tokens - 1, dtype=torch.bool, device=q.device).triu()
        # Nothing needs the logits themselves, autograd neither: to fill them in place is safe.
        seen = logits.view(len(logits), -1, tokens, logits.shape[2])
        seen[..., 1 - tokens :].masked_fill_(behind, float("-inf"))
    if sinks is not None:
        column = sinks.to(dtype).view(q.shape[1], q.shape[2], 1).repeat(len(q), 1, 1)
        logits = torch.cat([logits, column], dim=2)
    alpha = torch.softmax(logits, dim=2)
    if sinks is not None:
        alpha = alpha[:, :, :-1]
    out = torch.zeros_like(scaled)
    weights = alpha if v_scales is None else alpha * v_scales
    for piece in pieces:
        out += torch.bmm(weights[:, :, piece], values[:, piece].to(dtype))
    return out.view(q.shape).to(q.dtype), alpha.view(*q.shape[:3], k.shape[2])


def _sum_over_pages(alpha: Tensor, page_size: int, pages: int) -> Tensor:
    """S_u [R, pages] of weights [R, Hkv, G, T], 0 past the last token (R2)."""
    largest = alpha.flatten(1, 2).amax(dim=1)
    beyond = pages * page_size - largest.shape[1]
    if beyond:
        largest = F.pad(largest, (0, beyond))
    return largest.view(len(largest), pages, page_size).sum(dim=2)


def _join(parts: list[Tensor], empty: Tensor, dim: int = 0) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim=dim) if parts else empty


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Type to compute in: float32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
