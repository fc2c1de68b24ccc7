"""Planned and direct launches on a GPU: run with ``pytest -m gpu``."""

import pytest
import torch
from gpu_cases import make_gpu_case, poison_allocator

from deltadecode import DeltaConfig, ops
from deltadecode.ops import DecodeInputs, Scratch, plan_decode

pytestmark = pytest.mark.gpu
CONFIG = DeltaConfig(page_size=16, budget_pages=64, recent_pages=16)
LENGTHS = [1, 17, 1024, 1025, 2500, 5000, 3000, 64]


def moved(tensor, elements):
    """The same numbers so many elements behind an aligned address."""
    storage = torch.empty(tensor.numel() + elements, dtype=tensor.dtype, device="cuda")
    storage[elements:] = tensor.flatten()
    return storage[elements:].view(tensor.shape)


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_direct_launches_are_what_ordinary_ones_are(offset, monkeypatch):
    from deltadecode.ops.triton import direct

    case = make_gpu_case(LENGTHS)
    aligned = case.run(return_page_scores=True)
    q, *others = case.arguments
    case.arguments = (moved(q, offset), *others)
    found = [case.run(return_page_scores=True) for _ in range(3)]
    monkeypatch.setattr(direct, "_watched", lambda: True)
    found += [case.run(return_page_scores=True), aligned]
    for out, scores in found:
        assert torch.equal(out, found[0][0]) and torch.equal(scores, found[0][1])


def inputs_of(case, rows, **more):
    q, k, v, table, lens = case.arguments
    options = case.options
    return DecodeInputs(
        q[:rows], k, v, table[:rows], lens[:rows], options["scale"], options["page_size"], **more
    )


def run_layers(inputs, delta, sparse, scratch):
    """Output of a Δ-layer and of a sparse one, by their plans."""
    arguments = inputs.q, inputs.k_cache, inputs.v_cache, inputs.block_table, inputs.seq_lens
    outs = torch.empty_like(inputs.q), torch.empty_like(inputs.q)
    ids, counts = delta.run(*arguments, None, outs[0], scratch)
    sparse.run(*arguments, None, outs[1], scratch, ids, counts)
    return outs


def plan_layers(inputs, compile_rows=0):
    inputs.return_page_scores = True
    delta = plan_decode(inputs, CONFIG, compile_rows)
    rows, pages = inputs.q.shape[0], inputs.block_table.shape[1]
    inputs.return_page_scores = False
    inputs.page_ids = torch.zeros(rows, CONFIG.table_width(pages), dtype=torch.int32, device="cuda")
    inputs.page_counts = inputs.seq_lens
    return delta, plan_decode(inputs, None, compile_rows)


def test_a_captured_step_is_what_the_operations_give():
    case = make_gpu_case(LENGTHS)
    inputs = inputs_of(case, len(LENGTHS))
    plans = plan_layers(inputs)
    scratch = Scratch()
    eager = run_layers(inputs, *plans, scratch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_layers(inputs, *plans, scratch)
    del scratch
    poison_allocator()
    graph.replay()
    expected, scores = case.run(return_page_scores=True)
    ids, counts = ops.select_pages(scores, inputs.seq_lens, CONFIG)
    for outs in (eager, captured):
        assert torch.equal(outs[0], expected)
        assert torch.equal(outs[1], case.run(page_ids=ids, page_counts=counts))


def test_nothing_compiles_after_what_is_compiled_ahead(monkeypatch):
    from triton import knobs

    case = make_gpu_case(LENGTHS * 5, kv_heads=3, group=3, dim=64)
    plan_layers(inputs_of(case, 2), compile_rows=len(LENGTHS) * 5)
    compiled = []
    monkeypatch.setattr(
        knobs.runtime, "jit_post_compile_hook", lambda **event: compiled.append(event["repr"])
    )
    for rows in range(1, len(LENGTHS) * 5 + 1):
        inputs = inputs_of(case, rows)
        run_layers(inputs, *plan_layers(inputs), Scratch())
    assert not compiled
