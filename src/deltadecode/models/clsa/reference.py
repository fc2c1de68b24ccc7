"""The definition of CLSA: one sequence, one token at a time, no cache, no batch (docs/clsa.md).

Slow on purpose. It reads the weights of a model by name and shares no code with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def logits(model: Any, ids: list[int]) -> Tensor:
    """Logits [n, vocabulary] of the tokens of one sequence, in the model's dtype."""
    config, weights = model.config, dict(model.named_parameters())
    # Tied weights are one parameter.
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    w = {name.removeprefix("model."): value.detach() for name, value in weights.items()}
    x = [w["embed_tokens.weight"][token] for token in ids]
    first, layers = config.self_layers, config.num_hidden_layers
    window = len(ids) if config.mode == "transformer" else config.sliding_window
    for layer in range(first):
        x = _layer(config, w, layer, x, *_own_keys(config, w, layer, x), _last(len(ids), window))
    if first < layers:
        h = [_norm(config, one, w["memory_norm.weight"]) for one in x]
        keys = [_heads(config, w, "shared_kv.k_proj", "shared_kv.k_norm", one) for one in h]
        values = [_heads(config, w, "shared_kv.v_proj", None, one) for one in h]
        tokens = _last(len(ids), len(ids))
        if config.mode == "clsa":
            tokens = _indexed(config, w, h)
        for layer in range(first, layers):
            x = _layer(config, w, layer, x, keys, values, tokens)
    return torch.stack([w["lm_head.weight"] @ _norm(config, one, w["norm.weight"]) for one in x])


def _last(n: int, window: int) -> list[list[int]]:
    return [list(range(max(0, t - window + 1), t + 1)) for t in range(n)]


def _indexed(config: Any, w: dict[str, Tensor], h: list[Tensor]) -> list[list[int]]:
    """Tokens S_t that each token reads: those of the k largest I_ts, ties to the lower token."""
    chosen = []
    for t, one in enumerate(h):
        query = w["indexer.q_proj.weight"] @ one
        scores = [float(query @ (w["indexer.k_proj.weight"] @ other)) for other in h[: t + 1]]
        order = sorted(range(t + 1), key=lambda s: (-scores[s], s))
        chosen.append(sorted(order[: config.index_topk]))
    return chosen


def _layer(
    config: Any,
    w: dict[str, Tensor],
    layer: int,
    x: list[Tensor],
    keys: list[Tensor],
    values: list[Tensor],
    tokens: list[list[int]],
) -> list[Tensor]:
    """One layer: token t attends to ``tokens[t]``."""
    at, out = f"layers.{layer}", []
    turned = layer < config.self_layers
    groups = config.num_attention_heads // config.num_key_value_heads
    for t, one in enumerate(x):
        normed = _norm(config, one, w[f"{at}.input_layernorm.weight"])
        q = _heads(config, w, f"{at}.self_attn.q_proj", f"{at}.self_attn.q_norm", normed)
        q = _turn(config, q, t) if turned else q
        heads = []
        for head in range(config.num_attention_heads):
            own = head // groups
            dots = torch.stack([q[head] @ keys[s][own] for s in tokens[t]])
            alpha = torch.softmax(dots / config.head_dim**0.5, dim=0)
            heads.append(sum(a * values[s][own] for a, s in zip(alpha, tokens[t], strict=True)))
        one = one + w[f"{at}.self_attn.o_proj.weight"] @ torch.cat(heads)
        normed = _norm(config, one, w[f"{at}.post_attention_layernorm.weight"])
        gate = w[f"{at}.mlp.gate_proj.weight"] @ normed
        inner = gate * torch.sigmoid(gate) * (w[f"{at}.mlp.up_proj.weight"] @ normed)
        out.append(one + w[f"{at}.mlp.down_proj.weight"] @ inner)
    return out


def _own_keys(
    config: Any, w: dict[str, Tensor], layer: int, x: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    at, keys, values = f"layers.{layer}", [], []
    for t, one in enumerate(x):
        normed = _norm(config, one, w[f"{at}.input_layernorm.weight"])
        k = _heads(config, w, f"{at}.self_attn.k_proj", f"{at}.self_attn.k_norm", normed)
        keys.append(_turn(config, k, t))
        values.append(_heads(config, w, f"{at}.self_attn.v_proj", None, normed))
    return keys, values


def _norm(config: Any, x: Tensor, weight: Tensor) -> Tensor:
    normed: Tensor = x / (x.square().mean() + config.rms_norm_eps).sqrt()
    return weight * normed


def _heads(config: Any, w: dict[str, Tensor], proj: str, norm: str | None, x: Tensor) -> Tensor:
    heads = (w[f"{proj}.weight"] @ x).view(-1, config.head_dim)
    if norm is None:
        return heads
    return torch.stack([_norm(config, head, w[f"{norm}.weight"]) for head in heads])


def _turn(config: Any, heads: Tensor, t: int) -> Tensor:
    """Rotary position t of heads [H, D]: pairs (i, i + D / 2) turn by t · base^(-2 i / D)."""
    half = config.head_dim // 2
    i = torch.arange(half, dtype=heads.dtype)
    angle = t * config.rope_theta ** (-2 * i / config.head_dim)
    first, second = heads[:, :half], heads[:, half:]
    return torch.cat(
        [
            first * angle.cos() - second * angle.sin(),
            second * angle.cos() + first * angle.sin(),
        ],
        dim=1,
    )
