"""Attention sinks: which tokens get weight whatever they say, and what marks them.

The survey by Su et al. (arXiv 2604.10098) collects the phenomenon; the measure is that of Gu et al.
(arXiv 2410.10781), massive activations are those of Sun et al. (arXiv 2402.17762), and the small
values of sinks ("drains") are those of Guo et al. (arXiv 2410.13835).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltadecode.lab.inspection.measure import HiddenMeasure, LayerMeasure, Measure

EPSILON = 0.3  # Gu et al., section 3
# A token that few queries see gets a mean over few weights, above ε in any head that looks at the
# latest tokens. Gu et al. avoid it by looking at the first token of 64.
LEAST_QUERIES = 64
MASSIVE_PEAK = 100.0  # Sun et al., section 2: the magnitude, and the ratio to the median
MASSIVE_RATIO = 1000.0
_DIGITS = 6


@dataclass(frozen=True)
class Sink:
    """A token that is a sink in at least one head."""

    position: int  # token number, from 0
    heads: int  # heads of all full-attention layers whose mean weight on it exceeds ε
    mean: float  # largest mean weight of any head
    layer: int  # of that head, in the model's own numbering
    head: int
    # norm of its value ÷ the median over tokens, geometric mean over the KV heads of the heads
    # that it is a sink in; below 1: a drain
    value_ratio: float
    # norm of its hidden state ÷ the median over tokens, at the layer where that is largest
    hidden_ratio: float


def sink_heads(measured: Measure, epsilon: float, least_queries: int) -> Tensor:
    """Which tokens are sinks of which heads: I(α > ε) [layers, Hq, T] bool (Gu et al., section 3).

    A token counts only if ``least_queries`` queries see it, at most half of the text's.
    """
    least = _least(measured, least_queries)
    above = torch.stack([layer.mean > epsilon for layer in measured.attention])
    above[:, :, measured.tokens - least + 1 :] = False
    return above


def find_sinks(measured: Measure, above: Tensor) -> list[Sink]:
    """The sinks of a text, those of most heads first; ``above`` is as of :func:`sink_heads`."""
    means = torch.stack([layer.mean for layer in measured.attention])
    values = torch.stack([_to_median(layer.value_norm) for layer in measured.attention])
    hidden = torch.stack([_to_median(layer.norm) for layer in measured.hidden])
    group = means.shape[1] // values.shape[1]
    sinks = []
    for position in above.any(dim=1).any(dim=0).nonzero()[:, 0].tolist():
        layers, heads = above[:, :, position].nonzero(as_tuple=True)
        top = int(means[:, :, position].argmax())
        layer, head = divmod(top, means.shape[1])
        drained = values[layers, heads // group, position].clamp_min(1e-12)
        sinks.append(
            Sink(
                position=position,
                heads=len(layers),
                mean=float(means[layer, head, position]),
                layer=measured.attention[layer].layer,
                head=head,
                value_ratio=float(drained.log().mean().exp()),
                hidden_ratio=float(hidden[:, position].max()),
            )
        )
    return sorted(sinks, key=lambda sink: (-sink.heads, sink.position))


def describe(
    measured: Measure,
    tokens: list[str],
    page_size: int,
    epsilon: float = EPSILON,
    least_queries: int = LEAST_QUERIES,
) -> dict[str, Any]:
    """Sink metrics of a text, as the report and ``--json`` have them.

    ``epsilon``, ``least_queries``, ``tokens``; ``first_token_rate`` (share of all heads whose mean
    weight on token 0 exceeds ε, the metric of Gu et al.); ``rate`` (share of heads with any sink);
    ``layers``: per full-attention layer its ``rate`` and per head the token with the largest mean
    weight (``top_token``, ``top_mean``) and the mean weight on token 0 (``first_mean``), the
    ``learned`` sink's share and the output ``gate`` where there are such; ``sinks``: see
    :class:`Sink`, with the ``token`` and its ``page``; ``kinds``: how often each token text is a
    sink; ``hidden``: per decoder layer the largest magnitude, its place and ratio to the median,
    and the largest ratio of a token's norm to the median.
    """
    above = sink_heads(measured, epsilon, least_queries)
    least = _least(measured, least_queries)
    sinks = find_sinks(measured, above)
    return {
        "epsilon": epsilon,
        "least_queries": least,
        "tokens": measured.tokens,
        "heads": above.shape[0] * above.shape[1],
        "first_token_rate": _rounded(above[:, :, 0].float().mean()),
        "rate": _rounded(above.any(dim=2).float().mean()),
        "layers": [
            _layer(layer, above[place], measured.tokens, least)
            for place, layer in enumerate(measured.attention)
        ],
        "sinks": [
            {
                **{name: _rounded(value) for name, value in vars(sink).items()},
                "token": tokens[sink.position],
                "page": sink.position // page_size,
            }
            for sink in sinks
        ],
        "kinds": dict(Counter(tokens[sink.position] for sink in sinks).most_common()),
        "hidden": [_hidden(place, layer, tokens) for place, layer in enumerate(measured.hidden)],
    }


def _least(measured: Measure, least_queries: int) -> int:
    return min(least_queries, max(measured.tokens // 2, 1))


def _layer(layer: LayerMeasure, above: Tensor, tokens: int, least: int) -> dict[str, Any]:
    counted = layer.mean[:, : tokens - least + 1]
    top = counted.max(dim=1)
    report = {
        "layer": layer.layer,
        "rate": _rounded(above.any(dim=1).float().mean()),
        "top_token": top.indices.tolist(),
        "top_mean": _list(top.values),
        "first_mean": _list(layer.mean[:, 0]),
        "first_value_ratio": _list(_to_median(layer.value_norm)[:, 0]),
    }
    if layer.learned is not None:
        report["learned"] = _list(layer.learned)
    if layer.gate is not None:
        report["gate"] = _list(layer.gate)
    return report


def _hidden(place: int, states: HiddenMeasure, tokens: list[str]) -> dict[str, Any]:
    ratio = _to_median(states.norm)
    token = int(ratio.argmax())
    peak_ratio = states.peak / max(states.median, 1e-30)
    return {
        "layer": place,
        "peak": _rounded(states.peak),
        "peak_ratio": _rounded(peak_ratio),
        "peak_token": states.peak_token,
        "peak_channel": states.peak_channel,
        "massive": states.peak > MASSIVE_PEAK and peak_ratio >= MASSIVE_RATIO,
        "norm_token": token,
        "norm_text": tokens[token],
        "norm_ratio": _rounded(ratio[token]),
        "first_norm_ratio": _rounded(ratio[0]),
    }


def _to_median(norms: Tensor) -> Tensor:
    """Each token's norm ÷ the median over tokens, the last dimension."""
    return norms / norms.median(dim=-1, keepdim=True).values.clamp_min(1e-30)


def _rounded(value: Any) -> Any:
    value = value.item() if isinstance(value, Tensor) else value
    return round(value, _DIGITS) if isinstance(value, float) else value


def _list(values: Tensor) -> list[float]:
    return [round(value, _DIGITS) for value in values.tolist()]
