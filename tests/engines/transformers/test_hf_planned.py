"""Planned kernels of eager decode steps give what the operations give."""

import pytest
import torch

from deltadecode import DeltaConfig, ops
from deltadecode.engines.transformers import planned as module
from deltadecode.engines.transformers.packing import Packing
from deltadecode.engines.transformers.planned import PlannedKernels
from deltadecode.ops import Scratch

CFG = DeltaConfig(page_size=4, budget_pages=5, recent_pages=1, sink_pages=1)
ROWS, HEADS, KV_HEADS, DIM = 2, 4, 2, 16
OPTIONS = {"scale": DIM**-0.5, "page_size": 4, "sinks": None, "softcap": None}


@pytest.fixture
def kernels(monkeypatch):
    """On CPU tensors, with Triton's interpreter; counts plans."""
    pytest.importorskip("triton")
    if ops.kernels_refuse(torch.zeros(1, HEADS, DIM), torch.zeros(1, 8, KV_HEADS, DIM)):
        pytest.skip("needs the interpreter")
    monkeypatch.setattr(module, "_may_plan", lambda query: not torch.is_grad_enabled())
    made = []

    def counting(inputs, cfg):
        made.append(inputs)
        return ops.plan_decode(inputs, cfg)

    monkeypatch.setattr(module, "plan_decode", counting)
    found = PlannedKernels()
    found.made = made
    return found


def step(tokens, seed=0):
    """A query, and a row-wise cache of so many tokens, whole pages of them."""
    rng = torch.Generator().manual_seed(seed)
    query = torch.randn(ROWS, HEADS, 3, DIM, generator=rng)[:, :, 1]
    states = torch.randn(2, ROWS, KV_HEADS, -(-tokens // 4) * 4, DIM, generator=rng)
    keys, values = states.transpose(2, 3)
    table = torch.arange(ROWS, dtype=torch.int32)[:, None]
    lens = torch.full((ROWS,), tokens, dtype=torch.int32)
    return query, {"k_cache": keys, "v_cache": values, "block_table": table, "seq_lens": lens}


def check(kernels, query, inputs, options=OPTIONS):
    """A dense, a Δ- and a sparse layer; returns the pages."""
    out, scores = ops.decode_attention(query, **inputs, return_page_scores=True, **options)
    expected = ops.select_pages(scores, inputs["seq_lens"], CFG)
    sparse = ops.decode_attention(
        query, **inputs, page_ids=expected[0], page_counts=expected[1], **options
    )
    scratch = Scratch()
    with torch.no_grad():
        dense, none = kernels.attend(scratch, query, inputs, options)
        delta, pages = kernels.attend(scratch, query, inputs, options, select=CFG)
        read, nothing = kernels.attend(scratch, query, inputs, options, pages)
    assert none is None and nothing is None
    for found, want in ((dense, out), (delta, out), (read, sparse)):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(pages, expected, strict=True))
    return pages


def test_layers_are_what_the_operations_are_and_planned_once(kernels):
    seen = [check(kernels, *step(40, seed))[0].tolist() for seed in range(4)]
    assert len(kernels.made) == 3
    assert any(pages != seen[0] for pages in seen), "other tensors have to select other pages"
    # The same pages with another last token, and then another page.
    check(kernels, *step(39))
    assert len(kernels.made) == 3
    check(kernels, *step(41))
    assert len(kernels.made) == 6


@pytest.mark.parametrize(
    ("name", "value"), [("sinks", torch.ones(HEADS)), ("softcap", 5.0), ("scale", 0.5)]
)
def test_other_numbers_have_plans_of_their_own(kernels, name, value):
    query, inputs = step(40)
    check(kernels, query, inputs)
    check(kernels, query, inputs, OPTIONS | {name: value})
    check(kernels, query, inputs)
    assert len(kernels.made) == 6


def test_a_cache_that_grows_keeps_few_plans(kernels, monkeypatch):
    monkeypatch.setattr(module, "_MOST", 4)
    for tokens in (40, 44, 48, 52):
        check(kernels, *step(tokens))
        assert len(kernels._plans) <= 4


def test_what_needs_gradients_or_has_eight_bits_goes_to_the_operations(kernels):
    query, inputs = step(40)
    out, _ = kernels.attend(Scratch(), query.requires_grad_(), inputs, OPTIONS)
    assert out.requires_grad and not kernels.made
    packing = Packing("int8")
    states = inputs["k_cache"].transpose(1, 2)
    packed = packing.pack(states).transpose(1, 2)
    (keys, k_scales), (values, v_scales) = (packing.parts(packed) for _ in range(2))
    inputs |= {"k_cache": keys, "v_cache": values, "k_scales": k_scales, "v_scales": v_scales}
    with torch.no_grad():
        out, _ = kernels.attend(Scratch(), query, inputs, OPTIONS)
    assert torch.equal(out, ops.decode_attention(query.detach(), **inputs, **OPTIONS))
    assert not kernels.made
