"""The attention function that Transformers knows as ``"delta"``."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from deltadecode.engines.transformers.full import full_attention
from deltadecode.engines.transformers.layers import StoredLayer
from deltadecode.engines.transformers.lossless import Phase
from deltadecode.engines.transformers.rows import RowGroup
from deltadecode.engines.transformers.state import ROLE, Role
from deltadecode.engines.transformers.static import static_attention
from deltadecode.engines.transformers.step import Rows, Step
from deltadecode.errors import MissingSelectionError, UnsupportedCacheError, UnsupportedModelError
from deltadecode.ops import kernels_refuse

# What some models pass to their attention function and DELTA would have to know of.
_UNKNOWN = ("position_bias", "indices", "block_indices")
# What a row group's cache is to the operations, in the order of RowGroup.paged.
_INPUTS = ("k_cache", "v_cache", "block_table", "seq_lens")


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
    """Attention of one layer: full, or at a decode step what the module's role says.

    Dense layers attend to all tokens, Δ-layers too and select pages from their own weights, sparse
    layers attend to the pages of their Δ-layer (arXiv 2510.09883, section 3; docs/semantics.md, R1
    to R8). Everything else is full attention: prefill, passes that need gradients, modules that
    are not planned, and models that are not enabled.

    Parameters
    ----------
    module : nn.Module
        The attention module; carries its role.
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
    role = getattr(module, ROLE, None)
    static = role is not None and role.state.static.active
    if role is not None and role.state.graphs is not None and not torch.compiler.is_compiling():
        recorder = role.state.local.recorder
        if recorder is not None:
            given = {"dropout": dropout, "scaling": scaling, **kwargs}
            states = query, key, value, attention_mask
            return recorder.attend(delta_attention, module, *states, given)  # type: ignore[no-any-return]
    # The counts and the step in progress are Python state, which a compiled graph would freeze.
    attend = _uncompiled if torch.compiler.is_dynamo_compiling() and not static else _attend
    out: Tensor = attend(module, role, query, key, value, attention_mask, dropout, scaling, kwargs)
    return out, None


def _attend(
    module: nn.Module,
    role: Role | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    static = role.state.static if role is not None and role.state.static.active else None
    if role is not None and role.kind != "own" and role.state.draft_tokens:
        drafting = role.state.local.drafting
        if drafting is None:
            if static is not None:
                _refuse_static(query, key)
        elif static is None and drafting.phase is Phase.DRAFT:
            key, value, mask = drafting.held(role.layer, key, value)
            query = query.to(key.dtype)
        elif dropout == 0:
            _refuse_unknown(module, kwargs)
            _refuse_head_sizes(module, key, value)
            options = _options(role, query[:, :, 0], scaling, kwargs)
            attend = drafting.verify if static is None else drafting.attend
            out: Tensor | None = attend(role.layer, query, key, value, mask, options)
            if out is not None:
                return out
    elif role is not None and role.kind != "own":
        decode = _eager_step if static is None else _static_step
        out = decode(module, role, query, key, value, mask, dropout, scaling, kwargs)
        if out is not None:
            return out[:, None]
    if query.shape[2] > 1:  # at the prompt; later steps pass no more
        _refuse_unknown(module, kwargs)
    if static is not None and mask is None and static.tokens > 1:
        # Without a mask the cache was empty before, and what lies behind these is not written.
        key, value = key[:, :, : static.tokens], value[:, :, : static.tokens]
    return full_attention(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
    )


_uncompiled = torch.compiler.disable(_attend)


def _eager_step(
    module: nn.Module,
    role: Role,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Output [B, Hq, D] of a planned layer at a decode step; None where it is full attention."""
    state, layer = role.state, role.layer
    step = state.local.step
    if step is None or (step.rows is not None and layer == state.first):
        step = state.local.step = _step_outside(role, query, key)
    if layer == state.last:
        state.local.step = None
        if step.cache is not None:
            step.cache.begin(paging=False)
    held = None if step.cache is None else step.cache.held(layer)
    if held is not None:
        held.check_states(module, key)
    if not step.decodes or key.shape[2] == 1:  # one token without a past is a prompt
        _refuse_head_sizes(module, key, value)
        return None
    rows = step.see_rows(state.cfg, key, mask)
    if layer == state.first:
        step.full = step.full or dropout > 0
        full = rows.full_tokens
        state.stats.add_step(full, full if step.full else rows.sparse_tokens)
        if step.cache is not None and step.cache.fetches and not (rows.every_page or step.full):
            state.stats.offload.add_step()
    whole = _reads_all(role, rows)
    if step.full or (whole and not _in_place(held, rows, query, key)):
        if held is None:
            return None
        key, value = held.whole()
        out: Tensor = full_attention(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out[:, 0]
    _refuse_unknown(module, kwargs)
    _refuse_head_sizes(module, key, value)
    # Autocast leaves queries in float32 behind their rotation, beside keys in half precision.
    query = query[:, :, 0] if query.dtype == key.dtype else query[:, :, 0].to(key.dtype)
    options = _options(role, query, scaling, kwargs)
    return _attend_to_pages(role, step, rows, query, key, value, options)


def _reads_all(role: Role, rows: Rows) -> bool:
    return role.kind == "dense" or rows.every_page


def _in_place(held: StoredLayer | None, rows: Rows, query: Tensor, key: Tensor) -> bool:
    """Whether a layer that reads all tokens reads them where they are, without the stock function.

    On a GPU that one may plan its kernel anew for every number of tokens, which takes longer than
    the rest of a step. Rows of different starts would be a launch each, where it needs one.
    """
    if held is not None:
        return held.in_place
    return rows.together and _kernels_read(query, key)


def _kernels_read(query: Tensor, key: Tensor) -> bool:
    return query.is_cuda and kernels_refuse(query[:, :, 0], key.transpose(1, 2)) is None


def _step_outside(role: Role, query: Tensor, key: Tensor) -> Step:
    """The step of a module that is called outside of a forward pass of its model."""
    gradients = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return Step(query.shape[2] == 1 and not gradients and not role.state.local.prefilling)


def _static_step(
    module: nn.Module,
    role: Role,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """As :func:`_eager_step`, from the buffers of a static cache."""
    state = role.state
    _refuse_unknown(module, kwargs)
    _refuse_head_sizes(module, key, value)
    if not state.static.decodes:
        _refuse_static(query, key)
        state.prepare_counts(role.layer, key.device)
        return None
    full = state.static.full or dropout > 0
    one = query[:, :, 0].to(key.dtype)
    options = _options(role, one, scaling, kwargs)
    return static_attention(state, role.layer, one, key, value, mask, options, full)


def _refuse_static(query: Tensor, key: Tensor) -> None:
    if query.is_cuda and not torch.compiler.is_compiling():
        reason = kernels_refuse(query[:, :, 0], key.transpose(1, 2))
        if reason is not None:
            raise UnsupportedCacheError(
                "DELTA's static cache decodes with the Triton kernels on a GPU, which "
                f"{reason}; use the default cache"
            )


def _options(
    role: Role, query: Tensor, scaling: float | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What :func:`deltadecode.ops.decode_attention` needs besides; query [B, Hq, D]."""
    return {
        "scale": query.shape[2] ** -0.5 if scaling is None else scaling,
        "page_size": role.state.cfg.page_size,
        "sinks": kwargs.get("s_aux"),
        "softcap": kwargs.get("softcap"),
    }


def _refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {name} to its attention, which DELTA cannot use"
            )


def _refuse_head_sizes(module: nn.Module, key: Tensor, value: Tensor) -> None:
    if key.shape[3] != value.shape[3]:
        raise UnsupportedModelError(
            f"{type(module).__name__} has keys of size {key.shape[3]} and values of size "
            f"{value.shape[3]}; DELTA needs one head size"
        )


def _attend_to_pages(
    role: Role,
    step: Step,
    rows: Rows,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """A layer whose pages are read where they lie, or selected; [B, Hq, D] to [B, Hq, D]."""
    whole = _reads_all(role, rows)
    if role.source is None:
        step.selections[role.layer] = {}
        if step.cache is not None and not whole:
            step.cache.select(role.layer, rows.groups[0], key.shape[2])
    elif not whole and role.source not in step.selections:
        raise MissingSelectionError(role.layer, role.source)
    return rows.each_group(
        query,
        lambda place, group, part: _attend_group(
            role, step, group, place, part, key, value, options
        ),
    )


def _attend_group(
    role: Role,
    step: Step,
    group: RowGroup,
    place: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """Output of the rows of one group; a Δ-layer leaves its selection in the step."""
    cfg = role.state.cfg
    pages = -(-group.length // cfg.page_size)
    every_page = cfg.reads_all(group.length)
    held = None if step.cache is None else step.cache.held(role.layer)
    inputs: dict[str, Any]
    if held is None:
        inputs = dict(zip(_INPUTS, group.paged(key, value, cfg.page_size), strict=True))
    else:
        inputs = held.pages(place, group, cfg.page_size, whole=every_page)
    attend = functools.partial(role.state.kernels.attend, step.scratch, query, inputs, options)
    if every_page or role.kind == "dense":
        if role.kind == "delta" and not (step.rows and step.rows.every_page):
            ids = torch.arange(pages, dtype=torch.int32, device=query.device)
            _request(role, step, place, group, ids.expand(len(group.members), -1), None)
        return attend()[0]
    if role.source is not None:
        ids, counts = step.selections[role.source][place]
        return attend((ids.to(query.device), counts.to(query.device)))[0]
    out, selection = attend(select=cfg)
    assert selection is not None
    step.selections[role.layer][place] = ids, counts = selection
    _request(role, step, place, group, ids, counts)
    missing = pages * cfg.page_size - group.length
    if missing and not cfg.recent_pages:
        role.state.stats.add_unread(role.layer, (ids == pages - 1).sum() * missing)
    return out


def _request(
    role: Role, step: Step, place: int, group: RowGroup, ids: Tensor, counts: Tensor | None
) -> None:
    """Have the pages of a selection fetched from the host; without counts they are all pages."""
    if step.cache is None:
        return
    counts = torch.full_like(ids[:, 0], ids.shape[1]) if counts is None else counts
    fetch = step.cache.request(role.layer, place, group, ids, counts)
    if fetch is not None:
        role.state.stats.offload.add(fetch)
