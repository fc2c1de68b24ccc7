"""One pass over a text that measures its attention: all of it by token, some rows by page.

Under full attention, the row of a token in a pass over the whole text is what a decode step at that
token computes. So no step has to be decoded to be looked at.

No map of a layer is ever whole: the weights of a block of queries are added up by token and thrown
away. A block takes at most 4 MiB per copy (or one query of all heads, if that is more), and about
three copies are alive at once. What stays, for T tokens and R observed rows: ``4 · T · (Hq + Hkv +
1)`` bytes per layer, ``8 · R · N`` per layer with its N pages, and ``12 · R · T``. A model with
sliding-window layers adds the mask that Transformers makes for them, T² bytes, and with learned
sinks in those layers their own blocks of 64 MiB
(:func:`deltadecode.engines.transformers.full.blockwise_attention`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from deltadecode.architecture import num_layers, text_config
from deltadecode.engines.transformers.full import full_attention
from deltadecode.engines.transformers.swap import attending
from deltadecode.errors import InspectionError
from deltadecode.lab.policies.base import Layout, Scores

NAME = "deltadecode_measure"
# Larger blocks leave the caches of a CPU: 4 was the fastest of 1, 4, 16 and 64 MiB there.
BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Rows:
    """Which rows of a text are observed: decode steps with ``lengths`` [R] tokens n, ascending."""

    lengths: Tensor  # int64, on the CPU
    page_size: int


@dataclass(frozen=True)
class LayerRows:
    """What one full-attention layer does at the observed rows.

    ``page_scores`` [R, N] float32 is S_u (docs/semantics.md, R2), ``page_mass`` [R, N] float32
    m(u), the mean over the query heads of α, summed over the page. ``entropy`` [Hq] float64 is in
    bits, of what a head spends on tokens, scaled to 1; a mean over the rows. ``shift`` is the
    paper's: 1 - cos between this layer's α, a mean over heads, and that of the layer before; a mean
    over the rows, 0 in the first layer (arXiv 2510.09883 leaves open how heads and steps are put
    together).
    """

    page_scores: Tensor
    page_mass: Tensor
    entropy: Tensor
    shift: float


@dataclass(frozen=True)
class LayerMeasure:
    """What one full-attention layer does with a text of T tokens.

    ``mean`` [Hq, T] float32 is the mean weight of each token over the queries that see it, the
    token's own included; α of Gu et al. (arXiv 2410.10781), section 3. ``learned`` [Hq] is the mean
    weight over all queries of the learned sink, the extra logit in the denominator. ``gate`` [Hq]
    is the mean over tokens of the norm of a head's output behind the output gate to that before it;
    None where nothing lies between attention and its output projection. ``value_norm`` [Hkv, T] is
    the Euclidean norm of each token's value.
    """

    layer: int
    mean: Tensor
    learned: Tensor | None
    gate: Tensor | None
    value_norm: Tensor
    rows: LayerRows | None = None  # where any are observed


@dataclass(frozen=True)
class HiddenMeasure:
    """The hidden states that leave one decoder layer."""

    norm: Tensor  # [T] float32, Euclidean norm of each token's hidden state
    peak: float  # largest magnitude of any entry
    peak_token: int
    peak_channel: int
    median: float  # median magnitude of all entries


@dataclass(frozen=True)
class Measure:
    """A text of T tokens, as :func:`measure` sees it go through a model."""

    tokens: int
    attention: tuple[LayerMeasure, ...]  # one per full-attention layer, ascending
    hidden: tuple[HiddenMeasure, ...]  # one per decoder layer


def measure(
    model: Any,
    ids: Tensor,
    on_layer: Callable[[int], None] = lambda done: None,
    block_bytes: int = BLOCK_BYTES,
    rows: Rows | None = None,
) -> Measure:
    """Read a text, [1, T] token ids with T ≥ 2, in one pass of full attention; gives CPU tensors.

    ``block_bytes`` are those of the float32 weights of a block of queries. Raises InspectionError
    for other shapes, and UnsupportedModelError when the model has no full-attention layer.
    """
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise InspectionError(f"a measured text is [1, T >= 2] token ids, got {list(ids.shape)}")
    run = _Run(Layout.of(model), block_bytes, rows)
    with _measuring(model, run, on_layer), torch.inference_mode():
        # The base model: logits of all tokens would be the largest thing in memory.
        model.base_model(input_ids=ids.to(model.device), use_cache=False)
    missing = [layer for layer in run.layout.layers if layer not in run.attention]
    if missing:
        raise InspectionError(
            f"{type(model).__name__} does not call its attention through Transformers' interface "
            f"in layer {missing[0]}"
        )
    return Measure(
        int(ids.shape[1]),
        tuple(run.attention[layer] for layer in run.layout.layers),
        tuple(run.hidden[layer] for layer in sorted(run.hidden)),
    )


class _Run:
    """What a pass has measured so far."""

    def __init__(self, layout: Layout, block_bytes: int, rows: Rows | None) -> None:
        self.layout, self.block_bytes, self.rows = layout, block_bytes, rows
        self.attention: dict[int, LayerMeasure] = {}
        self.hidden: dict[int, HiddenMeasure] = {}
        self.outputs: Tensor | None = None  # norms [Hq, T] of the layer in progress, for its gate
        self.before: Tensor | None = None  # [R, T], mean α over heads of the layer before

    def see_gated(self, layer: int, gated: Tensor) -> None:
        """See what reaches the output projection; [1, T, Hq · D]."""
        before, self.outputs = self.outputs, None
        if before is None or layer not in self.attention:
            return
        heads, tokens = before.shape
        after = gated.reshape(tokens, heads, -1).float().norm(dim=2).T
        ratio = (after / before.clamp_min(torch.finfo(torch.float32).tiny)).mean(dim=1).cpu()
        if bool((ratio - 1).abs().max() > 1e-3):
            self.attention[layer] = replace(self.attention[layer], gate=ratio)


class _RowSums:
    """Adds up the observed rows of one layer, a block of queries after the other."""

    def __init__(self, run: _Run, heads: int, device: torch.device) -> None:
        self._run, self._first = run, 0
        self.places = run.rows.lengths.to(device) - 1 if run.rows else torch.empty(0)
        pages = -(-int(self.places[-1] + 1) // run.rows.page_size) if run.rows else 0
        width = pages * (run.rows.page_size if run.rows else 0)
        self._most, self._mean = (
            torch.zeros(len(self.places), width, device=device) for _ in range(2)
        )
        self._bits = torch.zeros(heads, dtype=torch.float64)

    def see(self, weights: Tensor, first: int) -> None:
        """See α of the queries from ``first`` on, [1, Hkv, G, Q, tokens so far]."""
        last = first + weights.shape[3]
        here = self.places[(self.places >= first) & (self.places < last)] - first
        if not len(here):
            return
        rows = weights[0, :, :, here].flatten(0, 1)
        place = slice(self._first, self._first + len(here))
        used = min(rows.shape[2], self._most.shape[1])
        self._most[place, :used] = rows.amax(dim=0)[:, :used]
        self._mean[place, :used] = rows.mean(dim=0)[:, :used]
        shares = rows / rows.sum(dim=2, keepdim=True)
        # 0 · log 0 is 0.
        self._bits -= torch.special.xlogy(shares, shares).sum(dim=(1, 2)).double().cpu()
        self._first = place.stop

    def finish(self) -> LayerRows | None:
        """Sums by page; the mean α stays for the next layer's shift."""
        if self._run.rows is None:
            return None
        count, size = len(self.places), self._run.rows.page_size
        before, self._run.before = self._run.before, self._mean
        shift = 0.0
        if before is not None:
            similar = torch.cosine_similarity(before.to(self._mean.device), self._mean)
            shift = 1 - float(similar.double().mean())
        return LayerRows(
            self._most.view(count, -1, size).sum(dim=2).cpu(),
            self._mean.view(count, -1, size).sum(dim=2).cpu(),
            self._bits / math.log(2.0) / count,
            shift,
        )


@contextmanager
def _measuring(model: Any, run: _Run, on_layer: Callable[[int], None]) -> Iterator[None]:
    layers = decoder_layers(model)
    stream = getattr(text_config(model), "altup_active_idx", 0)

    def see_hidden(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states = output if isinstance(output, Tensor) else output[0]
            # Gemma 3n's layers pass several streams on, and work in one of them.
            run.hidden[place] = _hidden(states[0] if states.dim() == 3 else states[stream, 0])
            on_layer(place + 1)

        return hook

    def see_projected(place: int) -> Callable[..., None]:
        return lambda module, inputs: run.see_gated(place, inputs[0])

    with ExitStack() as stack:
        for place, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(see_hidden(place)).remove)
            for part in layer.modules():
                projection = getattr(part, "o_proj", None)
                if getattr(part, "layer_idx", None) == place and isinstance(projection, nn.Module):
                    hook = projection.register_forward_pre_hook(see_projected(place))
                    stack.callback(hook.remove)
        stack.enter_context(attending(model, NAME, run))
        yield


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """The decoder layers of a model, in order; InspectionError when no list has their number."""
    text = text_config(model)
    count = num_layers(text)
    lists = [p for p in model.modules() if isinstance(p, nn.ModuleList) and len(p) == count]
    # A tower for images or sounds may have as many layers, of another configuration.
    own = [p for p in lists if any(getattr(m, "config", None) is text for m in p.modules())]
    if own or lists:
        return list((own or lists)[0])
    raise InspectionError(f"{type(model).__name__} has no list of its {count} decoder layers")


def measuring_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of Transformers' interface: full attention that adds its weights up.

    Output [1, T, Hq, D]; a mask of None is causal, and dropout of no matter.
    """
    run: _Run | None = getattr(module, NAME, None)
    if run is None:
        return full_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        ), None
    layer: int = module.layer_idx  # type: ignore[assignment]
    scores = Scores.of(query.shape[3], scaling, kwargs)
    sums = _RowSums(run, query.shape[1], query.device)
    out, totals = _added_up(query, key, value, attention_mask, scores, run.block_bytes, sums)
    tokens = totals.shape[1]
    seen_by = torch.arange(tokens, 0, -1, device=totals.device)
    learned = None
    if scores.sinks is not None:  # what the weights lack to a sum of 1 per query
        learned = (1 - totals.sum(dim=1) / tokens).cpu()
    norms = value[0].float().norm(dim=2).cpu()
    run.attention[layer] = LayerMeasure(
        layer, (totals / seen_by).cpu(), learned, None, norms, sums.finish()
    )
    run.outputs = out[0].float().norm(dim=2).T
    return out, None


def _added_up(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores, block: int,
    rows: _RowSums,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [1, T, Hq, D], and the weights [Hq, T] added up over the queries."""
    heads, tokens = query.shape[1:3]
    kv_heads = key.shape[1]
    size = max(1, block // (4 * heads * tokens))
    totals = torch.zeros(heads, tokens, device=query.device)
    place = torch.arange(tokens, device=query.device)
    parts = []
    for first in range(0, tokens, size):
        part = query[:, :, first : first + size]
        # Later keys are hidden from all queries of the block.
        last = first + part.shape[2]
        if mask is None:
            read = place[:last] <= place[first:last, None]
        else:
            allowed = mask if mask.dtype == torch.bool else mask == 0
            read = allowed[0, :, first:last, :last]
        weights = scores.weights(scores.logits(part, key[:, :, :last]), read)
        totals[:, :last] += weights.sum(dim=3).view(heads, last)
        rows.see(weights, first)
        packed = weights.to(value.dtype).reshape(1, kv_heads, -1, last) @ value[:, :, :last]
        parts.append(packed.view(1, heads, last - first, -1).transpose(1, 2))
    return torch.cat(parts, dim=1), totals


def _hidden(states: Tensor) -> HiddenMeasure:
    states = states.float()
    sizes = states.abs()
    top = int(sizes.argmax())
    token, channel = divmod(top, states.shape[1])
    return HiddenMeasure(
        states.norm(dim=1).cpu(), float(sizes[token, channel]), token, channel,
        float(sizes.median()),
    )  # fmt: skip


AttentionInterface.register(NAME, measuring_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
