"""Shapes of the launches."""

import pytest
import torch

from deltadecode import DeltaConfig

launch = pytest.importorskip("deltadecode.ops.triton.launch")
selection_shape = launch.selection_shape
plans = pytest.importorskip("deltadecode.ops.triton.plans")


@pytest.mark.parametrize("budget", [1, 64, 100, 512, 4096, 9000])
@pytest.mark.parametrize("width", [0, 1, 512, 2048, 2049, 4096, 8193, 65536, 100000, 524288])
@pytest.mark.parametrize("rows", [4, 256])
def test_what_the_pieces_find_fits_in_one(rows, width, budget):
    shape = selection_shape(rows, width, budget)
    longest = shape.least << (shape.sizes - 1)
    if shape.pieces == 1:
        assert shape.piece == 0 and longest <= 8192
        return
    assert width > longest >= shape.piece  # so a row in pieces has more than one
    assert shape.pieces * shape.piece >= width
    assert shape.pieces * budget <= shape.piece and budget <= 4096


def test_few_long_rows_are_selected_from_in_pieces():
    assert selection_shape(1, 4096, 64).pieces == 1
    for width, pieces, piece in ((8192, 8, 1024), (65536, 32, 2048)):
        shape = selection_shape(1, width, 64)
        assert (shape.pieces, shape.piece) == (pieces, piece)
    assert selection_shape(64, 32768, 64).pieces == 1


@pytest.mark.parametrize("rows", [1, 256])
@pytest.mark.parametrize(
    ("width", "pieces", "piece"),
    [(32769, 3, 16384), (131072, 8, 16384), (131073, 5, 32768), (524288, 16, 32768)],
)
def test_rows_of_an_index_go_in_pieces_however_many_they_are(rows, width, pieces, piece):
    shape = selection_shape(rows, width, 2048)
    assert (shape.pieces, shape.piece, shape.warps) == (pieces, piece, piece // 1024)
    assert selection_shape(rows, 524289, 2048).pieces == 1


@pytest.mark.parametrize("tile", [16, 64, 128])
@pytest.mark.parametrize("page", [1, 3, 8, 12, 16, 64, 100])
@pytest.mark.parametrize("width", [1, 64, 512, 513, 8192])
def test_pages_that_are_kept_cover_what_is_attended_to_before_the_next(width, page, tile):
    listed, step = launch.page_list(width, tile, page)
    assert listed & (listed - 1) == 0
    if width <= 512:
        assert step == 0 and listed >= width
        return
    assert step >= tile and step % tile == 0
    # From any tile's first token on.
    assert all(
        (first + step - 1) // page - first // page < listed for first in range(0, 9999, tile)
    )


def kernels(rows, tokens, sparse):
    """Compile-time constants of all launches of a step."""
    queries, float32 = (rows, tokens) if tokens else (rows,), torch.float32
    kind = plans.AttentionKind(
        torch.device("cpu"), queries, 12, 64, float32, float32, (1, 1, 1), float32, 16, 2,
        (1, 1, 1), (1, 1, 1), 512, 512, 16, 64, 64, sparse, not sparse, False, None, 1.0, None, 1.0,
    )  # fmt: skip
    plan = plans.AttentionPlan(kind)
    selection = plans.selection_kind(DeltaConfig(), queries, 5000, float32, 5000)
    launches = [plan._attend, plan._finish, *plans.SelectionPlan(selection)._launches]
    return [None if launch is None else launch._constants for launch in launches]


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("sparse", [True, False])
def test_every_number_of_rows_runs_kernels_of_a_captured_size(sparse, tokens):
    sizes = {rows: launch.padded(rows) for rows in range(1, 300)}
    assert [sizes[rows] for rows in (1, 3, 5, 9, 250, 257)] == [1, 4, 8, 16, 256, 272]
    for rows, size in sizes.items():
        assert kernels(rows, tokens, sparse) == kernels(size, tokens, sparse)
