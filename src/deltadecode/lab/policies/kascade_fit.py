"""Kascade's choice of anchor layers and head map on a development text (section 3.3)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from deltadecode.engines.transformers.bind import find_decoder
from deltadecode.errors import PolicyError
from deltadecode.lab.policies.base import Scores

_QUERIES = 64  # of the development text, at even places of its second half


@dataclass(frozen=True)
class KascadeFit:
    """Anchor layers, and for each layer the anchor's KV head that each of its KV heads takes.

    Layers are places among the full-attention layers.
    """

    anchors: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]

    def save(self, path: Path) -> None:
        """Write it as JSON, to be named as the option ``fit`` of the policy."""
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path, depth: int, kv_heads: int) -> KascadeFit:
        """Read what :meth:`save` wrote; PolicyError if it is not of a model of this size."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            fit = cls(tuple(values["anchors"]), tuple(map(tuple, values["heads"])))
            fits = len(fit.heads) == depth and 0 in fit.anchors and max(fit.anchors) < depth
            fits = fits and all(len(heads) == kv_heads for heads in fit.heads)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PolicyError(f"cannot read the fit {str(path)!r} of policy 'kascade'") from error
        if not fits:
            raise PolicyError(
                f"the fit {str(path)!r} of policy 'kascade' is not of {depth} layers with "
                f"{kv_heads} KV heads"
            )
        return fit


class Development:
    """What the layers of a model attend to in one text, collected as its prompt goes through."""

    def __init__(self, model: Any, layers: Sequence[int], k: int) -> None:
        self.model, self.layers, self.k = model, layers, k
        self._weights: list[Tensor] = []  # of each layer, [Hkv, Q, T]
        self._input: dict[int, Tensor] = {}
        self._importance: dict[int, float] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it lasts, a prompt's layers say how much attention changes their input.

        The importance of a layer is 1 minus the cosine of the residual stream before and after its
        attention, averaged over the tokens.
        """
        planned = find_decoder(self.model).planned
        names = {module: name for name, module in self.model.named_modules()}
        with ExitStack() as hooks:
            for layer, module in planned.items():
                block = self.model.get_submodule(names[module].rpartition(".")[0])
                before = block.register_forward_pre_hook(
                    partial(self._before, layer), with_kwargs=True
                )
                after = module.register_forward_hook(partial(self._after, layer))
                hooks.callback(before.remove)
                hooks.callback(after.remove)
            yield

    def _before(self, layer: int, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        del block
        if layer not in self._importance:
            self._input[layer] = args[0] if args else kwargs["hidden_states"]

    def _after(self, layer: int, module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        if layer not in self._importance:
            before = self._input.pop(layer)[:1].float()
            change = (output[0] if isinstance(output, tuple) else output)[:1].float()
            same = cosine_similarity(before, before + change, dim=2)
            self._importance[layer] = 1 - same.mean().item()

    def see(self, layer: int, query: Tensor, key: Tensor, scores: Scores) -> None:
        """Take the prompt of a layer: query [1, Hq, T, D], key [1, Hkv, T, D]."""
        if layer == 0:
            self._weights = []
        tokens = key.shape[2]
        places = torch.linspace(tokens // 2, tokens - 1, _QUERIES, device=key.device).long()
        causal = torch.arange(tokens, device=key.device) <= places[:, None]
        weights = scores.weights(scores.logits(query[:, :, places], key), causal)
        self._weights.append(weights[0].sum(dim=1))

    def fit(self, count: int) -> KascadeFit:
        """Choose so many anchors, and map every head of every layer onto one of its anchor."""
        heads = similarities(self._weights, self.k)
        importance = torch.tensor([self._importance.get(layer, 0.0) for layer in self.layers])
        layer_similarity = heads.amax(dim=3).mean(dim=2) * importance
        anchors = best_anchors(layer_similarity, count)
        sources = [max(a for a in anchors if a <= layer) for layer in range(len(self.layers))]
        maps = [heads[source, layer].argmax(dim=1) for layer, source in enumerate(sources)]
        return KascadeFit(tuple(anchors), tuple(tuple(map(int, each)) for each in maps))


def similarities(weights: Sequence[Tensor], k: int) -> Tensor:
    """How well the top-k tokens of a head serve a head of a later layer; [L, L, Hkv, Hkv].

    ``weights`` are those of each layer, [Hkv, Q, T]. Entry [a, b, i, j] is the weight of head i of
    layer b on the top-k of head j of layer a, divided by that on its own top-k: the least over the
    queries. Entries with b < a are 0.
    """
    depth, (heads, _, tokens) = len(weights), weights[0].shape
    k = min(k, tokens)
    tops = [layer.topk(k, dim=2).indices for layer in weights]
    result = torch.zeros(depth, depth, heads, heads)
    for b, layer in enumerate(weights):
        own = layer.gather(2, tops[b]).sum(dim=2)
        wide = layer[:, None].expand(-1, heads, -1, -1)
        for a in range(b + 1):
            served = wide.gather(3, tops[a].expand(heads, -1, -1, -1)).sum(dim=3)
            result[a, b] = (served / own[:, None]).amin(dim=2)
    return result


def best_anchors(similarity: Tensor, count: int) -> list[int]:
    """Places of ``count`` anchors, the first 0, with the largest sum over all layers.

    A layer counts by its ``similarity`` [a, b] to the anchor a at or before it. Exact, by dynamic
    programming over the layer and the number of anchors before it; ties go to the lower layers.
    """
    depth = len(similarity)
    table = similarity.double().tolist()
    # best[i]: the largest sum over layers 0 ... i - 1, and its anchors.
    best: list[tuple[float, list[int]]] = [
        (sum(table[0][:end]), [0]) if end else (float("-inf"), []) for end in range(depth + 1)
    ]
    for anchors in range(1, count):
        longer: list[tuple[float, list[int]]] = [(float("-inf"), [])] * (depth + 1)
        for end in range(anchors + 1, depth + 1):
            for anchor in range(anchors, end):
                total = best[anchor][0] + sum(table[anchor][anchor:end])
                if total > longer[end][0]:
                    longer[end] = total, [*best[anchor][1], anchor]
        best = longer
    return best[depth][1]
