"""The figures of pages are those of the files that they name, and of the shapes."""

import itertools
import json
from functools import cache

from docs_figures import RESULTS, compared, gain, rounded, rows_of, served
from docs_pages import ROOT, flowing, read
from transformers import AutoConfig

import deltadecode as dd
from benchmarks.e2e.shapes import SHAPES, find_shape
from benchmarks.memory.page import tables
from deltadecode.engines.transformers.offload_size import cache_bytes
from deltadecode.engines.transformers.packing import packed_bytes

page = cache(read)


def sides(file, places, unit, **keys):
    """Theirs, ours and ratio of the only such row, as a table writes them."""
    (row,) = rows_of(file, **keys)
    return compared(row, places, unit)


def kernel_sides():
    file = "kernels-20261125-h100.json"
    case = {"heads": "12/2", "batch": 64, "context": 32768, "peer": "FlashAttention-3"}
    (full,), (sparse,) = rows_of(file, op="dense", **case), rows_of(file, op="sparse", **case)
    return [f"{rounded(full['theirs'], 1)} µs", f"{rounded(sparse['ours'], 1)} µs", "–"]


def right_answers():
    found = [rows_of("eval-20261124-chain.json", policy=policy)[0] for policy in ("full", "delta")]
    assert f"{found[1]['attended_fraction']:.1%}" == "24.9%"
    return [str(round(row["score"] * row["samples"])) for row in found] + ["–"]


def test_numbers_of_the_readme_are_those_of_the_files():
    r1, short = "e2e-20261124-r1-1.5b.json", "e2e-20261125-r1-short.json"
    headline, shape_8b = "e2e-20261130-r1-headline-again.json", "e2e-20261124-qwen3-8b.json"
    served_r1 = "serve-20261130-r1-1.5b-reasoning-mp.json"
    served_8b = "serve-20261130-qwen3-8b.json"
    step = "decode step, bfloat16, context 16384"
    expected = [
        (headline, sides(headline, 1, "s", kind="headline")),
        (r1, sides(r1, 2, "ms", kind="step", context=18000)),
        (r1, sides(r1, 2, "ms", kind="step", context=2048)),
        (shape_8b, sides(shape_8b, 2, "ms", kind="step", batch=16)),
        (served_r1, served(served_r1, "reasoning", "tok_s", 0, "tok/s")),
        (served_8b, served(served_8b, "long-context", "tpot_p50", 1, "ms")),
        (served_8b, served(served_8b, "chat", "tok_s", 0, "tok/s")),
        (short, sides(short, 3, "s", kind="prefill")),
        ("kernels-20261125-h100.json", kernel_sides()),
        *(
            (file, sides(file, 0, "ms", case=step))
            for file in ("cpu-20261124.json", "cpu-20261124-xeon.json")
        ),
        ("eval-20261124-chain.json", right_answers()),
    ]
    readme = page("README.md")
    shown = [
        (links[0].rpartition("/")[2], cells[1:4])
        for cells, links in zip(readme.rows, readme.row_links, strict=True)
        if len(links) == 1 and links[0].startswith("benchmarks/results/")
    ]
    assert shown == expected


def test_loads_of_the_operators_page_are_those_of_the_files():
    text = flowing("docs/operating.md")
    r1, large = "serve-20261129-r1-1.5b.json", "serve-20261130-qwen3-8b.json"
    best = "serve-20261130-r1-1.5b-reasoning-mp.json"
    (slow,) = rows_of(large, workload="long-context")
    reasoning = f"{large.removesuffix('.json')}-reasoning.json"

    def rate(file, workload):
        return served(file, workload, "tok_s", 0, "")[2]

    assert f"[{rate(best, 'reasoning')} times the tokens a second](" in text
    assert f"them; {rate(reasoning, 'reasoning')} times with 32 on the 8B shape" in text
    assert f"takes 1 / {rounded(slow['tpot_ratio'], 2)} of the time" in text
    median = rounded(slow["ttft_p50_ours"] / slow["ttft_p50_theirs"], 2)
    assert f"take as long as before, the median ones {median} times as long" in text
    assert rounded(slow["ttft_p99_ratio"], 1) == "1.0"
    both = [rate(file, "shared-prefix") for file in (large, r1)]
    assert f"{both[0]} times the tokens a second on the 8B shape with 64 requests" in text
    assert f"{both[1]} times on the 1.5B shape, which has a fifth of the cache" in text
    both = [rate(file, "chat") for file in (large, r1)]
    assert f"Nothing is lost either: {both[0]} times stock's tokens a second" in text
    assert f"on the 8B shape, {both[1]} times on the 1.5B shape" in text
    slowest = [rows_of(file, workload="chat", rate="inf")[0] for file in (large, r1)]
    assert all(abs(row["ttft_p99_ratio"] - 1) < 0.03 for row in slowest)


def test_gains_of_steps_are_those_of_bytes_and_files():
    shapes = {"R1-Distill-Qwen-1.5B": "r1-1.5b", "Qwen3-8B": "qwen3-8b", "SmolLM2-135M": "smollm2"}
    operating = page("docs/operating.md")
    shown, model = 0, ""
    for cells, links in zip(operating.rows, operating.row_links, strict=True):
        if len(cells) != 5 or not links:
            continue
        model = cells[0].removesuffix(" shape") or model
        batch, context = (int(part.replace(",", "")) for part in cells[1].split(" × "))
        (row,) = (
            row
            for row in rows_of(links[0].rpartition("/")[2], batch=batch, context=context)
            if row["kind"] in ("step", "short")
        )
        bytes_ = SHAPES[shapes[model]].gain_by_bytes(batch, context)
        assert cells[2:4] == [rounded(bytes_, 2), gain(row)]
        shown += 1
    assert shown == 9


def test_what_lossless_mode_measured_is_on_its_page():
    def measured(*kinds):
        return [
            row
            for kind in kinds
            for tag in ("embedded", "smollm2")
            for row in rows_of(f"lossless-20261128-{kind}{tag}.json")
        ]

    def table(header):
        rows = page("docs/lossless.md").rows
        (start,) = (place for place, cells in enumerate(rows) if ", ".join(cells) == header)
        return itertools.takewhile(lambda cells: len(cells) == len(rows[start]), rows[start + 1 :])

    head, counted = "model, context, K, d, ", "drafted, verified, accepted"
    counts = table(f"{head}texts × tokens, {counted}, acceptance, attended fraction")
    times = table(f"{head}full attention, lossless, full ÷ lossless")
    for row, count, taken in zip(measured(""), counts, times, strict=True):
        assert row["same"] == row["texts"]
        where = [
            f"{row['context']:,}",
            str(row["budget_pages"]),
            str(row["draft_tokens"] or "chosen"),
        ]
        assert count[1:4] == taken[1:4] == where
        assert count[5:8] == [str(row[name]) for name in counted.split(", ")]
        assert count[8:] == [rounded(row[n], 3) for n in ("acceptance", "attended_fraction")]
        assert taken[4:] == compared(row, 1, "ms")
    equal = table("model, contexts, K, texts × tokens, equal tokens, acceptance")
    for row, cells in zip(measured("batches-", "batches-vllm-"), equal, strict=True):
        assert row["ours"] == row["theirs"] == row["tokens"] and row["first_unlike"] is None
        assert cells[2:4] == [
            str(row["budget_pages"]), f"{row['texts']} × {row['tokens'] // row['texts']}"
        ]  # fmt: skip
        assert cells[4:] == [
            f"{row['tokens']:,} of {row['tokens']:,}", rounded(row["acceptance"], 3)
        ]  # fmt: skip
    for row in measured("acceptance-"):
        assert row["ours"] == row["theirs"]


def test_times_of_sparse_layers_are_those_of_the_file():
    case = "sparse, in a graph, heads 12/2, batch 64, context 8192"
    (row,) = rows_of("kernels-20261129-last-page.json", case=case, peer="base b247196")
    text = flowing("docs/kernels.md")
    assert f"{rounded(row['ours'], 1)} µs at batch 64 and 8,192 tokens" in text
    assert f"where b247196 takes {rounded(row['theirs'], 1)} in the same run" in text


def test_times_of_lossless_graphs_are_those_of_the_file():
    text = flowing("docs/lossless.md")
    four, chosen = rows_of("lossless-20261129-h200-smollm2-static.json", same=1)
    for row, said in (four, "{} ms with 4 drafts"), (chosen, "{} ms where the number is chosen"):
        assert said.format(rounded(row["ours"], 1)) in text
        assert f"Transformers' own takes {rounded(row['theirs'], 1)} ms" in text


def test_times_of_lossless_mode_in_vllm_are_those_of_the_files():
    lossless = page("docs/lossless.md")
    shown = 0
    for cells, links in zip(lossless.rows, lossless.row_links, strict=True):
        if not links or "/results/e2e-" not in links[0]:
            continue
        batch, context = cells[0].partition(", where")[0].split(" × ")
        where = {"batch": int(batch), "context": int(context.replace(",", ""))}
        (row,) = rows_of(links[0].rpartition("/")[2], **where)
        assert cells[1:4] == compared(row, 2, "ms")
        shown += 1
    assert shown == 3


def test_releases_of_vllm_that_ran_are_those_of_the_file():
    rows = rows_of("smoke-20261129-vllm-cpu.json")
    assert not any(row["failed"] or row["skipped"] for row in rows)
    served = ["test_vllm_server" in row["files"] for row in rows]
    minors = [int(row["release"].split(".")[1]) for row in rows]
    assert minors == list(range(24, 34))
    assert served == [27 <= minor <= 32 for minor in minors]
    text = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    assert "| each of 0.27 to 0.32 | on a CPU ([runs][smoke]" in text
    assert "| each of 0.24 to 0.26, and 0.33 | there the first of these alone" in text


def test_what_a_context_needs_is_worked_out():
    config = AutoConfig.for_model(**find_shape("qwen3-8b").config())
    cfg = dd.DeltaConfig.for_model(config)
    rows = page("docs/memory.md").rows
    start = rows.index(["tokens", "GPU, default cache", "GPU, offloaded cache", "host"]) + 1
    for cells in rows[start : start + 4]:
        needs = cache_bytes(config, cfg, cfg.layer_plan(36), int(cells[0].replace(",", "")))
        sizes = needs.device, needs.offloaded_device, needs.offloaded_host
        assert cells[1:] == [f"{size / 1e9:.2f} GB" for size in sizes]


def test_hit_rates_and_losses_of_rounding_are_those_of_the_files():
    rows = page("docs/memory.md").rows
    start = rows.index(
        ["context", "K", "pages in all", "hit rate, first text", "hit rate, second text"]
    )
    file = "memory-20261128-smollm2-selections.json"
    for cells in rows[start + 1 : start + 5]:
        context, budget = int(cells[0].replace(",", "")), int(cells[1])
        found = rows_of(file, context=context, budget_pages=budget)
        assert cells[2] == str(-(-context // found[0]["page_size"]))
        assert cells[3:] == [rounded(row["hit_rate"], 3) for row in found]
    first, second = rows_of("memory-20261129-embedded-selections.json", context=2000)
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert f": {rounded(first['hit_rate'], 3)} and {rounded(second['hit_rate'], 3)}\n" in text
    start = rows.index(["keys and values", "opticks", "shakespeare"])
    columns = [rows_of(f"memory-20261129-smollm2-rounding-{name}.json") for name in rows[start][1:]]
    for cells, *both in zip(rows[start + 1 :], *columns, strict=False):
        assert cells[0] == both[0]["case"].partition(": ")[2]
        assert cells[1:] == [rounded(row["added"], 4) for row in both]


def test_bytes_and_losses_of_eight_bits_are_those_of_shapes_and_files():
    rows = page("docs/memory.md").rows
    start = rows.index(["KV heads × size", "bfloat16", "int8", "bfloat16 ÷ int8"])
    shapes = {"Qwen3-8B": "qwen3-8b", "R1-Distill-Qwen-1.5B": "r1-1.5b", "SmolLM2-135M": "smollm2"}
    for cells in rows[start + 1 : start + 4]:
        sizes, _, name = cells[0].partition(" (")
        shape = find_shape(shapes[name.removesuffix(")")])
        assert sizes == f"{shape.kv_heads} × {shape.head_dim}"
        half = 4 * shape.kv_heads * shape.head_dim
        eight = 2 * packed_bytes(shape.kv_heads, shape.head_dim)
        assert cells[1:] == [f"{half:,}", f"{eight:,}", rounded(half / eight, 2)]
    start = rows.index(["cache", "opticks", "shakespeare"])
    for cells in rows[start + 1 : start + 3]:
        found = [
            rows_of(f"memory-20261129-smollm2-eight-bits-{name}.json", kv_dtype=cells[0])[0]
            for name in rows[start][1:]
        ]
        assert cells[1:] == [rounded(row["added"], 4) for row in found]
        assert (cells[0] == "int8") == all(row["added"] <= 0.003 for row in found)


def test_what_caches_measured_is_on_their_page():
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    for file in RESULTS.glob("memory-*-h200-*.json"):
        for line in tables([json.loads(file.read_text(encoding="utf-8"))]):
            assert line in text, f"{file.name}: {line}"


def test_ratios_of_caches_are_those_of_their_files():
    memory = page("docs/memory.md")
    shown = [cells[1:4] for cells in memory.rows if cells[-1] in ("goals", "1.5, 10", "")][1:]
    assert len(shown) == 7
    graphs = "layer-graphs"
    points = (
        (graphs, 131072), (f"{graphs}-256k", 262144), (f"{graphs}-b4", 32768),
        ("rounds", 131072), ("256k", 131072), ("256k", 262144), ("b4", 32768),
    )  # fmt: skip
    for cells, (name, context) in zip(shown, points, strict=True):
        rows = rows_of(f"memory-20261129-h200-{name}.json", context=context, selections="measured")
        delta, _, offloaded = rows
        assert cells == [
            f"{context:,}", rounded(delta["ours"] / delta["theirs"], 2),
            rounded(offloaded["theirs"] / offloaded["ours"], 1),
        ]  # fmt: skip
    turns = rows_of("memory-20261129-h200-rounds.json", peer="DeltaCache", selections="measured")
    (host,) = rows_of("memory-20261129-host.json")
    text = flowing("docs/memory.md")
    for side in ("ours", "theirs"):
        first, second, third = (rounded(ms, 1) for ms in turns[0][f"rounds_{side}"])
        assert f"{first}, {second} and {third} ms" in text
        assert rounded(host[side], 1) + " ms" in text and f"{host[f'launches_{side}']:,}" in text


def test_the_demo_of_the_readme_is_the_one_on_file():
    (block,) = (block for block in page("README.md").blocks if block.language == "text")
    output = json.loads((RESULTS / "demo-20261124.json").read_text(encoding="utf-8"))["output"]
    assert block.text.splitlines() == output[:7]


def test_times_on_cpus_are_those_of_the_files():
    shown = [cells for cells in page("docs/speed.md").rows if len(cells) == 7]
    assert len(shown) == 13
    for case, *cells in shown[1:]:
        unit = "MiB" if case.startswith("peak memory") else "ms"
        files = ("cpu-20261124.json", "cpu-20261124-xeon.json")
        assert cells == [cell for file in files for cell in sides(file, 0, unit, case=case)], case


def test_times_of_kernels_are_those_of_the_file():
    shown = [cells for cells in page("docs/speed.md").rows if len(cells) == 5]
    assert len(shown) == 5
    for context, full, *ours in shown[1:]:
        case = {"heads": "12/2", "batch": 64, "context": int(context.replace(",", ""))}
        found = {
            op: rows_of("kernels-20261125-h100.json", op=op, peer="FlashAttention-3", **case)[0]
            for op in ("dense", "delta", "sparse")
        }
        assert full == f"{rounded(found['dense']['theirs'], 1)} µs"
        assert ours == [f"{rounded(row['ours'], 1)} µs" for row in found.values()]


def test_times_of_quicker_kernels_are_those_of_the_file():
    name = "kernels-20261129-addresses.json"
    kernels = page("docs/kernels.md")
    rows = kernels.rows
    (start,) = (at for at, cells in enumerate(rows) if cells[1:2] == ["the kernel before"])
    shown = rows[start + 1 : start + 1 + len(rows_of(name))]
    assert shown == [
        [row["case"], *(rounded(row[side], 1) for side in ("theirs", "ours")),
         gain(row)]
        for row in rows_of(name)
    ]  # fmt: skip
