"""Bytes of each kernel: the count by hand, and reading ncu's table."""

import pytest

from benchmarks.kernels.bytes import expected_bytes, make_rows, read_counters
from benchmarks.kernels.cases import Shape

SHAPE = Shape(12, 2, 64, 8192)
NAMES = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")


def table(launches):
    lines = ["==PROF== Connected", '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"']
    for number, (kernel, *values) in enumerate(launches):
        for name, value in zip(NAMES, values, strict=True):
            lines.append(f'"{number}","{kernel}","{name}","unit","{value}"')
    return "\n".join(lines)


def test_bytes_by_hand():
    kv, logits, scores = 64 * 8192 * 1024, 64 * 8192 * 12 * 4, 64 * 512 * 4
    assert [count for _, _, count in expected_bytes(SHAPE)] == [
        kv, kv + logits, logits + scores, scores, 64 * 1024 * 1024,
    ]  # fmt: skip


def test_counters_become_rows_in_the_order_of_the_launches():
    text = table([
        ("attend", "536,870,912", "1,000,000", "130,000"),
        ("finish", "1", "1", "1"),  # the merge of the dense layer
        ("attend", "540000000", "25000000", "150000"),
        ("finish", "25000000", "131072", "9000"),
        ("select", "131072", "0", "6000"),
        ("attend", "70000000", "0", "24000"),
        ("finish", "1", "1", "1"),
    ])  # fmt: skip
    rows = make_rows(SHAPE, read_counters(text))
    assert [line["case"].split(",")[0] for line in rows] == [
        "dense: attend", "Δ: attend", "Δ: finish", "Δ: select", "sparse: attend",
    ]  # fmt: skip
    assert rows[0]["ours"] == pytest.approx(537.87, abs=0.01)
    assert rows[1]["theirs"] == pytest.approx(562.04, abs=0.01)
    assert rows[2]["written_mb"] == 0.131
    assert rows[4]["us_under_ncu"] == 24.0
