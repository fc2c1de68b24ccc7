"""The memory benchmark on a GPU, in small: every cache decodes, Transformers' offloaded one too."""

import pytest

from benchmarks.e2e.shapes import find_shape
from benchmarks.memory.caches import DELTA, STOCK, STOCK_OFFLOADED
from benchmarks.memory.run import Options, run

pytestmark = pytest.mark.gpu


def test_every_cache_decodes():
    shape = find_shape("tiny")
    missed = [[1, 0, 2], [0, 1, 0]]
    options = Options(shape, shape.plan, [1, 2], [1000], 6, "", missed, longest=[1.2])
    result = run(options)
    assert not result["skipped"]
    steps = [row for row in result["rows"] if row["kind"] == "step"]
    assert {row["peer"] for row in steps} == {DELTA, STOCK, STOCK_OFFLOADED}
    for row in steps:
        assert row["ours"] > 0 < row["theirs"] and row["host_bytes_ours"] > 0
        assert (row["host_bytes_theirs"] > 0) == (row["peer"] == STOCK_OFFLOADED)
        if row["selections"] == "measured":
            # Six steps are two rounds: 3 pages for one sparse layer, 1 for each of two. In so small
            # a context the pool may hold one of them from the random steps before.
            assert row["hit_rate"] == pytest.approx(1 - 2 * (3 + 2) / (6 * 4 * 3), abs=0.06)
    for row in result["rows"]:
        if row["kind"] == "longest":
            assert row["held_ours"] and row["ours"] > 0
