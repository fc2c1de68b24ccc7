"""Full attention: what prefill, dense layers and the model's own layers compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Scores held at a time. Larger pieces bring no speed on a CPU, and a GPU is busy well below it.
_SCORE_BYTES = 64 * 2**20
# Bytes of an additive mask over all heads, which PyTorch makes on a GPU where the number of tokens
# is no multiple of 16: 11 GiB at 200 padded rows of 2,000 tokens and 4 heads.
_MASK_BYTES = 2**29
_ALIGNED = 16


def full_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> Tensor:
    """Masked attention over all keys, with everything that the model asks of it.

    The stock ``sdpa`` function computes it, unless there are learned sinks (``s_aux``) or a logit
    soft-cap (``softcap``), which it does not know (docs/semantics.md, R7).

    Query [B, Hq, Q, D], key and value [B, Hkv, T, D] to the output [B, Q, Hq, D]. The mask is
    boolean or additive and broadcasts to [B, Hq, Q, T]; None: causal if the module is. ``dropout``
    is the probability that a weight is dropped, ``scaling`` the factor on q · k (None: D to the
    power of -1/2), ``kwargs`` what else the model passes to its attention function.
    """
    sinks, softcap = kwargs.get("s_aux"), kwargs.get("softcap")
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    queries, tokens = query.shape[2], key.shape[2]
    if mask is None and causal and 1 < queries < tokens:
        # A chunk of a prompt, or a model that keeps a prompt's last queries only: ``sdpa`` would
        # take them for its first ones.
        plain = sinks is None and softcap is None and kwargs.get("position_bias") is None
        if plain and _flash_reads(query, key, value, dropout):
            return _last_queries(query, key, value, scaling)
        ones = torch.ones(queries, tokens, dtype=torch.bool, device=query.device)
        mask = ones.tril(tokens - queries)[None, None]
    if sinks is None and softcap is None:
        if query.shape[2] == 1 and query.is_cpu and dropout == 0.0:
            return _one_query(query, key, value, mask, scaling)
        count = queries_at_once(query, key, mask)
        if mask is not None and count < queries and kwargs.get("position_bias") is None:
            return _by_queries(count, query, key, value, mask, dropout, scaling)
        rows = rows_at_once(query, mask)
        outputs = [
            sdpa_attention_forward(module, *part, dropout=dropout, scaling=scaling, **kwargs)[0]
            for part in _by_rows(rows, query, key, value, mask)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return blockwise_attention(
        query,
        key,
        value,
        mask,
        scale=query.shape[3] ** -0.5 if scaling is None else scaling,
        causal=causal,
        sinks=sinks,
        softcap=softcap,
        dropout=dropout,
    )


def _flash_reads(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether PyTorch's flash kernel takes these, and no gradient goes back through it."""
    if not query.is_cuda or dropout > 0 or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return False
    params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, True)
    return bool(torch.backends.cuda.can_use_flash_attention(params))


def _last_queries(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention [B, Q, Hq, D] of the last Q of T tokens, without a mask in memory."""
    bias = causal_lower_right(query.shape[2], key.shape[2])
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, bias, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def rows_at_once(query: Tensor, mask: Tensor | None) -> int:
    """Rows of a batch that go through ``sdpa`` together, so that its memory stays bounded.

    Query [B, Hq, Q, D], mask [B or 1, Hq or 1, Q, T].
    """
    rows, heads = query.shape[:2]
    if mask is None or query.is_cpu or rows == 0:
        return rows
    return max(1, _MASK_BYTES // (heads * mask.shape[2] * mask.shape[3] * query.element_size()))


def queries_at_once(query: Tensor, key: Tensor, mask: Tensor | None) -> int:
    """Queries of one row that go through ``sdpa`` together: all, but of a long prompt in chunks.

    Query [B, Hq, Q, D], key [B, Hkv, T, D], mask [B or 1, Hq or 1, Q, T]. The query heads of a KV
    head go side by side, and share an additive mask with the other ones unless PyTorch copies it.
    """
    (heads, queries), (kv_heads, tokens) = query.shape[1:3], key.shape[1:3]
    if mask is None or query.is_cpu:
        return queries
    copies = kv_heads if mask.shape[1] > 1 or tokens % _ALIGNED else 1
    fitting = _MASK_BYTES // (heads // kv_heads * copies * tokens * query.element_size())
    return min(queries, max(1, fitting))


def _by_queries(
    count: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """Masked attention [B, Q, Hq, D] of ``count`` queries of one row at a time.

    The query heads of one KV head become queries of one head: keys are not repeated.
    """
    batch, heads, queries, _ = query.shape
    kv_heads, tokens = key.shape[1:3]
    group = heads // kv_heads
    mask = mask.expand(batch, -1, queries, tokens)
    outputs = []
    for row in range(batch):
        states = key[row : row + 1], value[row : row + 1]
        parts = []
        for first in range(0, queries, count):
            part = query[row, :, first : first + count]
            size = part.shape[1]
            own = mask[row, :, first : first + count]
            if own.shape[0] > 1:
                own = own.reshape(1, kv_heads, group * size, tokens)
            else:
                own = own.expand(group, -1, -1).reshape(1, 1, group * size, tokens)
            packed = part.reshape(1, kv_heads, group * size, -1)
            out = nn.functional.scaled_dot_product_attention(
                packed, *states, own, dropout_p=dropout, scale=scale
            )
            parts.append(out.view(heads, size, -1).transpose(0, 1))
        outputs.append(torch.cat(parts))
    return torch.stack(outputs)


def _by_rows(
    rows: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """The arguments of attention, some rows of the batch at a time."""
    if rows >= query.shape[0]:
        yield query, key, value, mask
        return
    for first in range(0, query.shape[0], rows):
        part = slice(first, first + rows)
        own = mask if mask is None or mask.shape[0] == 1 else mask[part]
        yield query[part], key[part], value[part], own


def _one_query(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attention of one query per row on a CPU; [B, Hq, 1, D] to [B, 1, Hq, D].

    The query heads of one KV head become the queries of one head, so that its keys are read once:
    several times faster than one head after the other in half precision.
    """
    rows, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    if rows * kv_heads == 1 and heads % 2 == 0 and key.dtype == torch.float32 and mask is None:
        # One (row, head) is one task, which leaves the other cores idle: make it two.
        kv_heads, key, value = 2, key.expand(1, 2, -1, -1), value.expand(1, 2, -1, -1)
    packed = query.reshape(rows, kv_heads, heads // kv_heads, dim)
    if mask is not None and mask.shape[1] > 1:
        mask = mask.expand(rows, heads, 1, -1).reshape(rows, kv_heads, heads // kv_heads, -1)
    out = nn.functional.scaled_dot_product_attention(packed, key, value, mask, scale=scale)
    return out.reshape(rows, 1, heads, -1)


def blockwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    causal: bool,
    sinks: Tensor | None,
    softcap: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention with learned sinks and a soft-cap, for a block of queries at a time.

    Query [B, Hq, Q, D], whose last one stands at the last key; key and value [B, Hkv, T, D] with
    T ≥ Q. The mask is boolean or additive and broadcasts to [B, Hq, Q, T]; without one, ``causal``
    hides the keys behind each query. ``sinks`` [Hq] are one more logit in each softmax denominator;
    with ``softcap``, logits become ``softcap * tanh(logit / softcap)``. Gives [B, Q, Hq, D] like
    value; the softmax is in float32, in float64 for float64 input.
    """
    rows, heads, queries, _ = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    group = heads // kv_heads
    size = max(1, _SCORE_BYTES // (4 * rows * heads * tokens))
    keys = key.transpose(2, 3)
    dtype = torch.promote_types(query.dtype, torch.float32)
    outputs = []
    for first in range(0, queries, size):
        part = query[:, :, first : first + size]
        count = part.shape[2]
        # Query heads of one KV head side by side: no copy of the keys per query head.
        packed = part.reshape(rows, kv_heads, group * count, -1)
        logits = (packed @ keys).to(dtype).mul(scale).view(rows, heads, count, tokens)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if mask is not None:
            logits = _masked(logits, mask[:, :, first : first + count])
        elif causal and queries > 1:
            place = torch.arange(first, first + count, device=key.device) + tokens - queries
            seen = torch.arange(tokens, device=key.device) <= place[:, None]
            logits = _masked(logits, seen)
        if sinks is not None:
            sink = sinks.to(dtype).view(1, heads, 1, 1).expand(rows, heads, count, 1)
            logits = torch.cat([logits, sink], dim=3)
        weights = torch.softmax(logits, dim=3)[..., :tokens]
        weights = nn.functional.dropout(weights, dropout, training=dropout > 0)
        packed = weights.to(value.dtype).reshape(rows, kv_heads, group * count, tokens) @ value
        outputs.append(packed.view(rows, heads, count, -1).transpose(1, 2))
    return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return logits + mask
    # The lowest number instead of -inf: a padding token that sees nothing then gets a finite
    # output, which is never read, where -inf would give NaN, which spreads.
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
