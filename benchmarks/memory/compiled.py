"""Norms and MLPs of a model, compiled in place: their many small kernels become few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo

from deltadecode.cli.output import one_line
from deltadecode.engines.transformers.interface import attention_modules

BACKEND: Any = "inductor"  # of torch.compile
# Graphs that all parts share. Each batch has a graph of its own for every shape of a part.
_GRAPHS = 64
_REFUSED = "norms and MLPs cannot be compiled"


def parts_of(model: Any) -> dict[str, nn.Module]:
    """Norms and MLPs of all decoder layers, by name.

    They are the direct children of a layer and of its attention, but those of PyTorch itself:
    these start one kernel already.
    """
    attentions = [each for named in attention_modules(model).values() for each in named]
    inner = {id(module) for _, module in attentions}
    found = {}
    for name, attention in attentions:
        layer = name.rpartition(".")[0]
        for prefix, holder in (layer, model.get_submodule(layer)), (name, attention):
            for child, part in holder.named_children():
                holds_attention = any(id(module) in inner for module in part.modules())
                if not holds_attention and not type(part).__module__.startswith("torch."):
                    found[f"{prefix}.{child}"] = part
    return found


@torch.no_grad()
def compile_parts(model: Any, batches: Sequence[int]) -> None:
    """Compile norms and MLPs in place, for decode steps of these batch sizes.

    One token goes through the model for each of them, so that a step that is timed finds
    everything compiled. The model then has no other lengths in it than a step's.

    Raises
    ------
    ValueError
        In one line, where something of it could not be compiled.
    """
    if dynamo.disable:
        raise ValueError(f"{_REFUSED}: PyTorch's compiler is switched off")
    torch._dynamo.reset()
    # Layers have the same code, so all of their graphs count together.
    dynamo.recompile_limit = max(dynamo.recompile_limit, _GRAPHS)
    dynamo.suppress_errors = False
    for part in parts_of(model).values():
        # As one graph: else what PyTorch cannot compile would run as it did, without a word.
        part.compile(fullgraph=True, dynamic=False, backend=BACKEND)
    try:
        for batch in batches:
            tokens = torch.zeros((batch, 1), dtype=torch.long, device=model.device)
            model(tokens, use_cache=False, logits_to_keep=1)
    except RuntimeError as error:
        inner = getattr(error, "inner_exception", error)  # of a backend's own
        raise ValueError(f"{_REFUSED}: {type(inner).__name__}: {one_line(inner)}") from error
