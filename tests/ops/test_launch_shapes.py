"""Shapes of the launches."""

import pytest

selection_shape = pytest.importorskip("deltadecode.ops.triton.launch").selection_shape


@pytest.mark.parametrize("budget", [1, 64, 100, 512, 4096, 9000])
@pytest.mark.parametrize("width", [0, 1, 512, 2048, 2049, 4096, 8193, 65536, 100000])
def test_what_the_pieces_find_fits_in_one(width, budget):
    shape = selection_shape(4, width, budget)
    longest = shape.least << (shape.sizes - 1)
    if shape.pieces == 1:
        assert shape.piece == 0 and longest <= 8192
        return
    assert width > longest >= shape.piece  # so a row in pieces has more than one
    assert shape.pieces * shape.piece >= width
    assert shape.pieces * budget <= shape.piece


def test_few_long_rows_are_selected_from_in_pieces():
    assert selection_shape(1, 4096, 64).pieces == 1
    for width, pieces, piece in ((8192, 8, 1024), (65536, 32, 2048)):
        shape = selection_shape(1, width, 64)
        assert (shape.pieces, shape.piece) == (pieces, piece)
        assert selection_shape(64, width, 64).pieces == 1
