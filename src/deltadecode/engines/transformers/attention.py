"""The attention function that Transformers knows as ``"delta"``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltadecode.engines.transformers.prefill import full_attention
from deltadecode.engines.transformers.state import (
    ModelState,
    Step,
    find_state,
    set_state,
)
from deltadecode.engines.transformers.static import static_attention
from deltadecode.errors import UnsupportedCacheError, UnsupportedModelError
from deltadecode.ops import decode_attention, kernels_refuse, select_pages

# What some models pass to their attention function and DELTA would have to know of.
_UNKNOWN = ("position_bias", "indices", "block_indices")


def delta_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: full, or at a decode step what the layer's role says.

    A decode step is one new token per row behind a cache. Dense layers attend to all tokens,
    Δ-layers too and select pages from their own weights, sparse layers attend to the pages of
    their Δ-layer (arXiv 2510.09883, section 3; docs/semantics.md, R1 to R8). Everything else is
    full attention: prefill, training, and the model's own sliding-window layers.

    Parameters
    ----------
    module : nn.Module
        The attention module, with ``config`` and ``layer_idx``.
    query : Tensor
        [B, Hq, Q, D].
    key, value : Tensor
        [B, Hkv, T, D], the new tokens last.
    attention_mask : Tensor or None
        As the mask function of ``sdpa`` makes it, or a user's own 4-dimensional one.
    dropout : float
        Probability that a weight is dropped.
    scaling : float or None
        Factor on q · k; None: D to the power of -1/2.
    **kwargs
        What else the model passes, as ``s_aux`` (learned sinks) and ``softcap``.

    Returns
    -------
    tuple
        Output [B, Q, Hq, D], and None in the place of the weights.

    Raises
    ------
    UnsupportedModelError
        When the layer's attention needs something that DELTA does not compute.
    """
    state = find_state(module.config)
    static = state is not None and state.static.active
    if torch.compiler.is_compiling() and not static:
        result: tuple[Tensor, None] = _uncompiled(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return result
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    layer: int | None = getattr(module, "layer_idx", None)
    if causal and layer is not None:  # neither holds for the encoder of a multimodal model
        state = state or set_state(module.config, None)
        if state.plan.roles[layer] != "own":
            # One token without a past is a prompt; so is the last chunk of a prompt (R1).
            one = query.shape[2] == 1 and key.shape[2] > 1 and dropout == 0.0
            if not one or (state.static if static else state.progress).prefilling:
                _check_planned(module, key, value, kwargs)
                if static:
                    _check_kernels(query, key)
                    state.prepare_counts(layer, key.device)
            else:
                out = _decode_step(
                    state, layer, module, query, key, value, attention_mask, scaling, kwargs
                )
                if out is not None:
                    return out[:, None], None
    if static and attention_mask is None and query.shape[2] > 1:
        # Without a mask the cache was empty before, and what lies behind these is not written.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    out = full_attention(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return out, None


# The counts and the step in progress are Python state, which a compiled graph would freeze.
_uncompiled = torch.compiler.disable(delta_attention)


def _decode_step(
    state: ModelState,
    layer: int,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Output [B, Hq, D] of a planned layer at a decode step; None where it is full attention."""
    options = {
        "scale": query.shape[3] ** -0.5 if scaling is None else scaling,
        "page_size": state.cfg.page_size,
        "sinks": kwargs.get("s_aux"),
        "softcap": kwargs.get("softcap"),
    }
    if state.static.active:
        _check_planned(module, key, value, kwargs)
        return static_attention(state, layer, query[:, :, 0], key, value, mask, options)
    step = state.begin(layer, key, mask)
    if state.plan.roles[layer] == "dense" or step.every_page:
        return None
    _check_planned(module, key, value, kwargs)
    return _LayerStep(state, step, layer, key, value, options).output(query[:, :, 0])


def _check_planned(module: nn.Module, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> None:
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {name} to its attention, which DELTA cannot use"
            )
    if key.shape[3] != value.shape[3]:
        raise UnsupportedModelError(
            f"{type(module).__name__} has keys of size {key.shape[3]} and values of size "
            f"{value.shape[3]}; DELTA needs one head size"
        )


def _check_kernels(query: Tensor, key: Tensor) -> None:
    if not query.is_cuda or torch.compiler.is_compiling():
        return
    reason = kernels_refuse(query[:, :, 0], key.transpose(1, 2))
    if reason is not None:
        raise UnsupportedCacheError(
            f"DELTA's static cache decodes with the Triton kernels on a GPU, which {reason}; use "
            "the default cache"
        )


@dataclass(frozen=True)
class _LayerStep:
    """A Δ or sparse layer at a decode step that has a row over the budget.

    Attributes
    ----------
    state : ModelState
        Gives the budget and the plan, and takes the counts.
    step : Step
        Gives the rows, and holds the selections.
    layer : int
        The layer's number.
    key, value : Tensor
        [B, Hkv, T, D].
    options : dict
        What :func:`deltadecode.ops.decode_attention` needs besides.
    """

    state: ModelState
    step: Step
    layer: int
    key: Tensor
    value: Tensor
    options: dict[str, Any]

    def output(self, query: Tensor) -> Tensor:
        """Attend; [B, Hq, D] to [B, Hq, D]."""
        source = self.state.plan.sources[self.layer]
        if source is None:
            self.step.selections[self.layer] = {}
        elif source not in self.step.selections:
            raise RuntimeError(
                f"layer {self.layer} reads the pages of Δ-layer {source}, which has not run in "
                "this step"
            )
        groups = self.step.groups
        if groups[0].rows is None:
            return self._group_output(0, query)
        out = torch.empty_like(query)
        for place, group in enumerate(groups):
            out[group.rows] = self._group_output(place, query[group.rows])
        return out

    def _group_output(self, place: int, query: Tensor) -> Tensor:
        """Output of the rows of one group; a Δ-layer leaves its selection in the step."""
        cfg, group = self.state.cfg, self.step.groups[place]
        source = self.state.plan.sources[self.layer]
        keys = group.blocks(self.key, cfg.page_size)
        values = group.blocks(self.value, cfg.page_size)
        inputs = query, keys, values, group.block_table, group.seq_lens
        out: Tensor
        if group.length <= cfg.budget_pages * cfg.page_size:
            out = decode_attention(*inputs, **self.options)
        elif source is not None:
            ids, counts = self.step.selections[source][place]
            ids, counts = ids.to(query.device), counts.to(query.device)
            out = decode_attention(*inputs, page_ids=ids, page_counts=counts, **self.options)
        else:
            out, scores = decode_attention(*inputs, return_page_scores=True, **self.options)
            ids, counts = select_pages(scores, group.seq_lens, cfg)
            self.step.selections[self.layer][place] = ids, counts
            pages = -(-group.length // cfg.page_size)
            missing = pages * cfg.page_size - group.length
            if missing and not cfg.recent_pages:
                self.state.stats.add_unread(self.layer, (ids == pages - 1).sum() * missing)
        return out
