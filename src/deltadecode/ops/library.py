"""The operations as ``torch.ops.deltadecode.*``, which compiled graphs and CUDA graphs can hold.

A compiler sees each as one opaque node with a known output shape. What is registered here calls
them while it is being traced, and the backends directly otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints

import torch
from torch import Tensor

from deltadecode.config import DeltaConfig
from deltadecode.errors import OperationError
from deltadecode.ops.dispatch import run_decode, run_select
from deltadecode.ops.inputs import (
    DecodeInputs,
    check_decode,
    check_numbers,
    check_select,
    needs_gradients,
)

_FIELDS = tuple(field.name for field in fields(DecodeInputs))
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    int: "int",
    bool: "bool",
}


# DecodeInputs and optionally a backend, to the output and the page scores, if asked for.
Decode = Callable[..., tuple[Tensor, Tensor | None]]


def register_decode(
    name: str, prepare: Callable[[DecodeInputs], DecodeInputs] | None = None
) -> Decode:
    """Register ``decode_attention`` as ``torch.ops.deltadecode.<name>``, and return its caller.

    The operator takes the fields of :class:`DecodeInputs` and the backend by position. It returns
    page scores in any case: empty ones when they are not asked for.

    Parameters
    ----------
    name : str
        Of the operator.
    prepare : callable, optional
        Makes what the backends take of what the operator takes, without a copy; it may change its
        argument.
    """
    hints = get_type_hints(DecodeInputs)
    parameters = [f"{_SCHEMA_TYPES[hints[field]]} {field}" for field in _FIELDS]

    def run(*values: Any) -> tuple[Tensor, Tensor]:
        inputs = DecodeInputs(*values[:-1])
        _refuse_gradients(inputs)
        out, scores = _checked(inputs, values[-1])
        return out, inputs.q.new_empty(0, dtype=torch.float32) if scores is None else scores

    def fake(*values: Any) -> tuple[Tensor, Tensor]:
        inputs = DecodeInputs(*values[:-1])
        q = inputs.q
        if not inputs.return_page_scores:
            return q.new_empty(q.shape), q.new_empty(0, dtype=torch.float32)
        inputs = inputs if prepare is None else prepare(inputs)
        dtype = torch.promote_types(q.dtype, torch.float32)
        pages = inputs.block_table.shape[1] * inputs.k_cache.shape[1] // inputs.page_size
        return q.new_empty(q.shape), q.new_empty((*inputs.scored_queries, pages), dtype=dtype)

    _register(name, [*parameters, "str backend"], run, fake)
    operator = getattr(torch.ops.deltadecode, name)

    def _checked(inputs: DecodeInputs, backend: str) -> tuple[Tensor, Tensor | None]:
        if prepare is not None:
            inputs = prepare(inputs)
        check_numbers(inputs)
        check_decode(inputs)
        return run_decode(inputs, backend)

    def decode(inputs: DecodeInputs, backend: str = "auto") -> tuple[Tensor, Tensor | None]:
        if not torch.compiler.is_compiling():
            return _checked(inputs, backend)
        if prepare is None:  # what others make of their inputs is checked when it runs
            check_decode(inputs)
        _refuse_gradients(inputs)
        out, scores = operator(*[getattr(inputs, field) for field in _FIELDS], backend)
        return out, scores if inputs.return_page_scores else None

    return decode


def _refuse_gradients(inputs: DecodeInputs) -> None:
    if needs_gradients(inputs):
        raise OperationError(
            "decode_attention computes no gradients inside a compiled graph, got an input that "
            "requires them; compile under torch.no_grad(), or do not compile"
        )


def select(
    page_scores: Tensor, seq_lens: Tensor, cfg: DeltaConfig, backend: str
) -> tuple[Tensor, Tensor]:
    """Call ``select_pages`` as an operator, with what it needs of a configuration."""
    page_ids, page_counts = torch.ops.deltadecode.select_pages(
        page_scores, seq_lens, cfg.page_size, cfg.budget_pages, cfg.budget_share,
        cfg.recent_pages, cfg.sink_pages, backend,
    )  # fmt: skip
    return page_ids, page_counts


def _config(page: int, budget: int, share: float, recent: int, sink: int) -> DeltaConfig:
    return DeltaConfig(page, budget, recent, sink, (), (), budget_share=share)


def _select_pages(page_scores: Tensor, seq_lens: Tensor, *values: Any) -> tuple[Tensor, Tensor]:
    cfg = _config(*values[:-1])
    check_select(page_scores, seq_lens, cfg)
    return run_select(page_scores, seq_lens, cfg, values[-1])


def _fake_select_pages(
    page_scores: Tensor, seq_lens: Tensor, *values: Any
) -> tuple[Tensor, Tensor]:
    *rows, pages = page_scores.shape
    width = _config(*values[:-1]).table_width(pages)
    return page_scores.new_empty((*rows, width), dtype=torch.int32), seq_lens.new_empty(rows)


def _register(
    name: str, parameters: list[str], run: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    name = f"deltadecode::{name}"
    schema = f"({', '.join(parameters)}) -> (Tensor, Tensor)"
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "CompositeExplicitAutograd", run)
    torch.library.register_fake(name, fake)


decode = register_decode("decode_attention")
_register(
    "select_pages",
    ["Tensor page_scores", "Tensor seq_lens", "int page_size", "int budget_pages",
     "float budget_share", "int recent_pages", "int sink_pages", "str backend"],
    _select_pages, _fake_select_pages,
)  # fmt: skip
