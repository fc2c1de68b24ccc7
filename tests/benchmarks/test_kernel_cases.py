"""The kernel benchmark's shapes, bytes and inputs."""

import re

import pytest
import torch

from benchmarks.kernels.cases import (
    CFG,
    CONTEXTS,
    SELECT_FIXED,
    Shape,
    calls_per_graph,
    error_shapes,
    grid,
    input_sets,
    moved_bytes,
    parse_heads,
)
from benchmarks.kernels.inputs import (
    SCALE,
    exact_attention,
    inputs_bytes,
    make_inputs,
    relative_error,
)
from benchmarks.kernels.peers import topk_select
from deltadecode import ops

CPU = torch.device("cpu")


# The grid


def test_the_full_grid_has_every_combination_once():
    shapes = grid()
    assert len(shapes) == len(set(shapes)) == 3 * 4 * 8
    assert (CONTEXTS[0], CONTEXTS[-1]) == (1024, 131072)
    assert Shape(28, 4, 16, 65536) in shapes


def test_a_quick_run_has_five_shapes_of_one_head_shape():
    assert [(s.heads_label, s.batch, s.context) for s in grid(quick=True)] == [
        ("12/2", 64, 1024),
        ("12/2", 64, 8192),
        ("12/2", 64, 16384),
        ("12/2", 64, 32768),
        ("12/2", 1, 131072),
    ]


def test_options_replace_the_axes_of_a_full_run_and_choose_in_a_quick_one():
    assert grid(heads=[(16, 8)], batches=[3, 3], contexts=[1000]) == [Shape(16, 8, 3, 1000)]
    assert grid(quick=True, batches=[1]) == [Shape(12, 2, 1, 131072)]
    assert grid(quick=True, heads=[(32, 8)], contexts=[8192]) == [Shape(32, 8, 64, 8192)]
    with pytest.raises(ValueError, match=r"nothing is left with batch \[2\] and context any"):
        grid(quick=True, batches=[2])
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        grid(contexts=[8, 0])


@pytest.mark.parametrize("text", ["12", "12/0", "0/2", "12/5", "2/12", "a/b", "12/2/1", " 12/2"])
def test_heads_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match=f"got {re.escape(repr(text))}"):
        parse_heads(text)


def test_heads_are_read():
    assert parse_heads("28/4") == (28, 4)


def test_errors_are_taken_once_per_head_shape_at_a_moderate_context():
    assert error_shapes(grid()) == {Shape(*heads, 1, 8192) for heads in [(12, 2), (28, 4), (32, 8)]}
    assert error_shapes([Shape(12, 2, 1, 1024), Shape(12, 2, 2, 32768)]) == {Shape(12, 2, 2, 32768)}


# Bytes, by hand


@pytest.mark.parametrize(
    ("op", "shape", "expected"),
    [
        # b = 2 · 2 heads · 128 · 2 bytes = 1,024 bytes.
        ("dense", Shape(12, 2, 64, 8192), 64 * 8192 * 1024),
        # 12 logits of 4 bytes, written and read: 96 bytes a token.
        ("scores", Shape(12, 2, 64, 8192), 64 * 8192 * 1120),
        ("delta", Shape(12, 2, 64, 8192), 64 * 8192 * 1120),
        ("sparse", Shape(12, 2, 64, 8192), 64 * 1024 * 1024),
        ("sparse", Shape(12, 2, 3, 100), 3 * 100 * 1024),
        # b = 2 · 8 · 128 · 2 = 4,096 bytes; 32 logits: 256 bytes a token.
        ("delta", Shape(32, 8, 1, 1000), 4_352_000),
        # 63 pages of 16 tokens, 4 bytes each.
        ("select", Shape(32, 8, 2, 1000), 504),
    ],
)
def test_moved_bytes(op, shape, expected):
    assert moved_bytes(op, shape) == expected


def test_input_sets_exceed_four_times_the_cache_and_no_more():
    assert input_sets(1000, 100) == 1
    assert input_sets(401, 100) == 1
    assert input_sets(400, 100) == 2  # together more than, not as much as, the cache four times
    assert input_sets(100, 100) == 5
    assert input_sets(1, 10**6) == 256


def test_calls_fill_a_graph_in_whole_rounds():
    assert calls_per_graph(10, 1) == 134  # 3 µs each
    assert calls_per_graph(10, 100) == 200
    assert calls_per_graph(300_000_000, 1) == 4  # 100 µs each
    assert calls_per_graph(10**11, 3) == 3


# Inputs


@pytest.mark.parametrize("context", [1, 100, 1024, 2100, 8192])
def test_selections_are_what_select_pages_could_give(context):
    shape = Shape(4, 2, 2, context)
    inputs = make_inputs(shape, CPU, l2_bytes=2**20)
    assert inputs.block_table.flatten().sort().values.tolist() == list(
        range(inputs.block_table.numel())
    )
    assert len(inputs.caches) == input_sets(shape.cache_bytes, 2**20)
    assert inputs.caches[0][0].stride()[0] == 2 * 16 * 2 * 128  # a block's values follow its keys
    expected = min(shape.pages, CFG.budget_pages)
    seen = set()
    for number, chosen in inputs.sparse:
        for row in range(2):
            pages = chosen.page_ids[row, : chosen.page_counts[row]].tolist()
            assert pages == sorted(set(pages))
            assert len(pages) == expected
            assert chosen.page_ids[row, expected:].eq(-1).all()
            assert chosen.tokens[row] == sum(min(16, context - 16 * page) for page in pages)
            blocks = chosen.blocks[row, :expected]
            assert blocks.tolist() == inputs.block_table[row, pages].tolist()
            # No page is read again before all have been.
            assert not seen & {(number, row, page) for page in pages}
            seen |= {(number, row, page) for page in pages}


def test_inputs_take_the_memory_that_is_predicted():
    shape = Shape(4, 2, 2, 1000)
    inputs = make_inputs(shape, CPU, l2_bytes=2**20)
    pool = sum(keys.nbytes + values.nbytes for keys, values in inputs.caches)
    assert inputs_bytes(shape, 2**20) == pool + 2 * 1000 * 4 * 4
    assert pool > 4 * 2**20


@pytest.mark.parametrize("sparse", [False, True])
def test_the_exact_result_is_that_of_the_reference(sparse):
    inputs = make_inputs(Shape(4, 2, 3, 2100), CPU, l2_bytes=1)
    keys, values = (cache.double() for cache in inputs.caches[0])
    chosen = inputs.sparse[0][1]
    options = {"page_ids": chosen.page_ids, "page_counts": chosen.page_counts} if sparse else {}
    expected = ops.decode_attention(
        inputs.q.double(), keys, values, inputs.block_table, inputs.seq_lens,
        scale=SCALE, page_size=16, backend="reference", **options,
    )  # fmt: skip
    exact = exact_attention(inputs, 2, sparse)
    torch.testing.assert_close(exact, expected[:2])
    assert relative_error(expected, exact) < 1e-12
    assert relative_error(1.5 * expected, exact) == pytest.approx(0.5)


@pytest.mark.parametrize("pages", [3, 64, 65, SELECT_FIXED[1]])
def test_topk_selects_what_we_select(pages):
    scores = torch.rand(4, pages)
    lens = torch.full((4,), 16 * pages, dtype=torch.int32)
    ids, counts = ops.select_pages(scores, lens, CFG, backend="reference")
    assert topk_select(scores).tolist() == ids[:, : counts[0]].tolist()
