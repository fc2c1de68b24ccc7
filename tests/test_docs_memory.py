"""What the sentences of docs/memory.md say of its result files is what is in them."""

import json

from docs_pages import ROOT, flowing

from benchmarks.e2e.shapes import find_shape
from benchmarks.memory.caches import kinds
from benchmarks.memory.run import _RESERVE

TEXT = flowing("docs/memory.md")


def rows_of(tag, **keys):
    """Rows of a run on a GPU in which these keys have these values."""
    file = ROOT / "benchmarks" / "results" / f"memory-20261129-h200-{tag}.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if all(row.get(key) == value for key, value in keys.items())]


def of_delta(tag):
    """The rows beside ``DeltaCache``, with measured and with random selections."""
    measured, random = rows_of(tag, kind="step", peer="DeltaCache")
    assert (measured["selections"], random["selections"]) == ("measured", "random")
    return measured, random


def test_what_a_long_prompt_takes() -> None:
    (row,) = rows_of("prompt")
    gpu, host = (row[f"{name}_ours"] / 1e9 for name in ("gpu_peak", "host_bytes"))
    said = f"{gpu:.1f} GB of the GPU at most, weights and all, and {host:.1f} GB of the host"
    assert f"A prompt of {row['tokens']:,} tokens" in TEXT and said in TEXT
    assert "`DeltaOffloadedCache` takes half as long again" in TEXT
    assert round(row["ours"] / row["theirs"], 1) == 1.5


def test_what_a_step_costs() -> None:
    measured, _ = of_delta("layer-graphs")
    assert f"[{measured['ours']:.1f} ms instead of {measured['theirs']:.1f}](#measured)" in TEXT
    first, second, third = (f"{ms:.1f}" for ms in measured["rounds_ours"])
    assert f"took {first}, {second} and {third} ms a step" in TEXT
    said = f"At 131,072 tokens the cache takes {measured['gpu_bytes_ratio']:.1f} times less"
    assert said in TEXT


def test_what_random_selections_add() -> None:
    for tags, said in (
        (
            ("layer-graphs", "layer-graphs-256k", "512k"),
            "{} to {} ms to a step of one long sequence",
        ),
        (("layer-graphs-b4", "b4-128k"), "and {} to {} ms to one of four"),
    ):
        pairs = [of_delta(tag) for tag in tags]
        added = [random["ours"] - measured["ours"] for measured, random in pairs]
        assert said.format(round(min(added)), round(max(added))) in TEXT


def test_the_longest_contexts() -> None:
    (row,) = rows_of("24gb", kind="longest", peer="DynamicCache")
    assert row["held_ours"] and row["held_theirs"]
    times = f"{int(10 * row['ratio']) / 10} times as long as `DynamicCache` allows"
    assert f"The context on 24 GB is {times}" in TEXT
    shape = find_shape("qwen3-8b")
    weights = 2 * shape.parameters
    found = {}
    for size in (24, 80):
        for kind in kinds(shape, shape.plan):
            tokens = kind.longest(1, int(size * 1e9) - weights - _RESERVE, None)
            found[size, kind.name] = tokens, kind.needs(1, tokens).host / 1e9
    for name, side in (("DynamicCache", "theirs"), ("DeltaOffloadedCache", "ours")):
        assert found[24, name][0] == row[f"by_gpu_{side}"]
    stock, (ours, host) = found[80, "DynamicCache"][0], found[80, "DeltaOffloadedCache"]
    said = f"{stock:,} tokens with `DynamicCache`, and {ours:,} with `DeltaOffloadedCache`"
    assert f"{said}, which then takes {host:.0f} GB of the host" in TEXT
