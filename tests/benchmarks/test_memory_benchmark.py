"""The memory benchmark: what it counts, in small, on a simulated device."""

import importlib
import json
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch

import deltadecode as dd
from benchmarks.command import launch
from benchmarks.e2e.shapes import find_shape
from benchmarks.memory import run as bench
from benchmarks.memory.__main__ import memory
from benchmarks.memory.caches import DELTA, OURS, STOCK, STOCK_OFFLOADED, fill, held_bytes, kinds
from benchmarks.memory.page import tables
from benchmarks.memory.rows import RANDOM
from benchmarks.memory.selections import Walk, load_record, record_row

TINY = find_shape("tiny")
CFG = TINY.plan
MISSED = [[2, 0, 1, 0, 3], [0, 1, 0, 0, 1]]


@pytest.fixture
def call(outcome):
    return lambda *arguments: outcome(partial(launch, memory), *arguments)


def record_file(folder, *rows):
    path = folder / "record.json"
    path.write_text(json.dumps({"rows": rows}))
    return path


def test_a_walk_changes_as_many_pages_as_the_record(monkeypatch):
    walk = Walk(
        MISSED, CFG, layers=2, batch=2, first=500, steps=40, device=torch.device("cpu")
    )  # fmt: skip
    nothing = torch.empty(2, CFG.budget_pages)
    seen = {layer: [walk(nothing) for _ in range(1)] for layer in range(2)}
    for _ in range(39):
        for layer in range(2):
            seen[layer].append(walk(nothing))
    for layer, ids in seen.items():
        for member in range(2):
            changes = np.roll(MISSED[layer], -37 * member)
            held = set(ids[0][member].tolist())
            for step in range(1, 40):
                now = ids[step][member].tolist()
                assert now == sorted(set(now)) and len(now) == CFG.budget_pages
                last = -(-(500 + step) // CFG.page_size) - 1
                assert now[-1] == last
                others = set(now) - {last} - held
                assert len(others) == min(changes[(step - 1) % 5], 3)
                held = set(now)


def test_the_record_of_the_longest_context_with_most_fetches(tmp_path):
    rows = [
        record_row(context, number, cfg, [[missed] * 3], "text")
        for cfg in (CFG, dd.DeltaConfig())
        for context, number, missed in ((800, 0, 1), (800, 1, 2), (400, 0, 3))
    ]
    path = record_file(tmp_path, *rows)
    assert load_record(path, CFG) == rows[1]
    assert rows[1]["hit_rate"] == 0.5 and rows[1]["ratio"] == 2
    with pytest.raises(ValueError, match="must have a record of 4 pages of 16 tokens, got none"):
        load_record(record_file(tmp_path, *rows[3:]), CFG)


@pytest.mark.parametrize(
    ("text", "why"),
    [(None, "No such file"), ("{}", "no rows"), ("[]", "no rows"), ("{", "no rows")],
)
def test_selections_of_another_file_are_refused(call, tmp_path, text, why):
    path = tmp_path / "record.json"
    if text is not None:
        path.write_text(text)
    code, out, err = call("--shape", "tiny", "--selections", path)
    assert (code, out) == (2, "")
    assert "--selections must be a result of --record, got" in err and why in err


def test_rows_of_steps_of_every_cache(call, tmp_path):
    path = record_file(tmp_path, record_row(400, 0, CFG, MISSED, "text"))
    code, out, err = call(
        *("--shape", "tiny", "--context", 500, "--batch", 2, "--steps", 10, "--rounds", 1),
        *("--selections", path, "--json"),
    )
    assert code == 0, err
    result = json.loads(out)
    assert [(row["peer"], row["selections"]) for row in result["rows"]] == [
        (DELTA, "measured"), (DELTA, "random"), (STOCK, "measured"), (STOCK, "random")
    ]  # fmt: skip
    assert [left["case"] for left in result["skipped"]] == [
        f"batch 2, 500 tokens: {STOCK_OFFLOADED}"
    ]
    assert result["selections"]["file"] == "record.json"
    measured, random, *_ = result["rows"]
    # Ten steps are two rounds of the record. A sparse layer behind either Δ-layer: 1 and 2 of them.
    fetched, read = (min(6, 6) * 1 + 2 * 2) * 2 * 2, 10 * 4 * 3 * 2
    assert measured["hit_rate"] == pytest.approx(1 - fetched / read, abs=1e-4)
    assert measured["fetched_bytes"] > 0 < random["fetched_bytes"]
    for row in result["rows"]:
        assert row["ours"] > 0 < row["theirs"] and row["steps_ours"] == row["steps_theirs"] == 10
        assert (
            row["gpu_bytes_ratio"] > 1.2 and row["host_bytes_ours"] > 0 == row["host_bytes_theirs"]
        )


def test_every_cache_decodes_at_lengths_of_its_own(monkeypatch):
    one_step, steps = bench.Bench._step, []

    def step(self, cache, batch):
        seconds = one_step(self, cache, batch)
        steps.append((type(cache).__name__, cache.get_seq_length()))
        return seconds

    monkeypatch.setattr(bench.Bench, "_step", step)
    result = bench.run(bench.Options(TINY, CFG, [1], [300], 2, "", MISSED))
    # Ours and DELTA's twice, with both ways to select pages.
    assert len(steps) == len({length for _, length in steps}) == (2 + 2 + 1) * (3 + 2)
    assert max(steps, key=itemgetter(1)) == (OURS, 300)
    last = dict(steps)
    for row in result["rows"]:
        assert (row["tokens_ours"], row["tokens_theirs"]) == (300, last[row["peer"]])


def test_a_context_must_have_room_for_the_lengths_of_all_caches(call):
    code, out, err = call("--shape", "tiny", "--context", 40, "--steps", 2)
    assert (code, out) == (2, "")
    assert "at least 121 tokens for 3 rounds of 2 steps of every cache, got 40" in err


def test_rounds_go_there_and_back_again_and_are_joined(monkeypatch):
    kinds_in_turn, slow = [], iter([0.0, 9.0, 0.0])
    measured = bench.Bench.measure

    def measure(self, kind, batch, context, turn=0):
        found = measured(self, kind, batch, context, turn)
        kinds_in_turn.append(kind.name)
        if kind.name == OURS:
            found[RANDOM]["times"] = [1.0 + next(slow)] * 2
        return found

    monkeypatch.setattr(bench.Bench, "measure", measure)
    result = bench.run(bench.Options(TINY, CFG, [1], [300], 2, "", rounds=3))
    names = [kind.name for kind in kinds(TINY, CFG)]
    assert kinds_in_turn == names + names[::-1] + names
    for row in result["rows"]:
        assert (row["ours"], row["rounds_ours"], row["steps_ours"]) == (1.0, [1.0, 10.0, 1.0], 6)
        assert min(row["rounds_theirs"]) <= row["theirs"] <= max(row["rounds_theirs"])


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_bytes_that_are_needed_are_those_that_are_held(kv_dtype):
    options = bench.Options(TINY, CFG, [1], [700], 1, "", kv_dtype=kv_dtype)
    tiny = bench.Bench(options)
    for kind in tiny.kinds[:3]:
        tiny.switch(kind)
        cache = kind.make(tiny.config, tiny.device)
        fill(cache, TINY, tiny.like, 3, 2000)
        tiny._step(cache, 3)
        held, needs = held_bytes(cache, tiny.device), kind.needs(3, 2000)
        # Here a number has four bytes, and not two; or one.
        size = 1 if kv_dtype and kind.is_ours else 2
        assert held.host == size * needs.host
        assert (held.host > 0) == (kind.name == OURS)
        assert 0.5 * needs.gpu < held.gpu / size < 1.1 * needs.gpu


def test_the_longest_context_is_the_last_that_fits():
    for kind in kinds(TINY, CFG):
        tokens = kind.longest(1, 10**8, None)
        assert kind.needs(1, tokens).gpu <= 10**8 < kind.needs(1, tokens + 1).gpu
    ours = kinds(TINY, CFG)[0]
    tokens = ours.longest(1, 10**8, 10**6)
    assert ours.needs(1, tokens).host <= 10**6 < ours.needs(1, tokens + 1).host


def test_longest_contexts_are_held_once(call, monkeypatch):
    # Between the weights of the tiny model, 3 MB, and what else a real one needs.
    monkeypatch.setattr(bench, "_RESERVE", 0)
    code, out, err = call(
        *("--shape", "tiny", "--context", 200, "--steps", 1, "--longest", 0.006, "--json")
    )
    assert code == 0, err
    rows = [row for row in json.loads(out)["rows"] if row["kind"] == "longest"]
    assert [row["peer"] for row in rows] == [DELTA, STOCK, STOCK_OFFLOADED]
    assert [row["held_theirs"] for row in rows] == [True, True, False]
    for row in rows:
        assert row["held_ours"] and row["ours"] > 0 < row["theirs"]
        assert row["ratio"] == round(row["ours"] / row["theirs"], 3)


def test_selections_of_a_model_are_recorded(call):
    pytest.importorskip("deltadecode_embedded")
    code, out, err = call(
        *("--record", "embedded", "--context", 500, "--steps", 6, "--texts", 1, "--budget", 12),
        "--json",
    )
    assert code == 0, err
    (row,) = json.loads(out)["rows"]
    assert len(row["missed"]) == 4 and {len(missed) for missed in row["missed"]} == {6}
    assert row["hit_rate"] == pytest.approx(1 - np.mean(row["missed"]) / 12, abs=1e-4)
    assert 0 < row["hit_rate"] < 1


def test_a_large_shape_needs_a_gpu(call, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = call("--shape", "qwen3-8b")
    assert (code, out) == (2, "") and "needs a CUDA GPU" in err


def test_tables_of_the_page_have_every_cache_once():
    step = {
        "kind": "step", "batch": 1, "context": 131072, "ours": 40.04, "hit_rate": 0.9,
        "gpu_bytes_ours": 3e9, "host_bytes_ours": 16e9, "gpu_bytes_theirs": 19e9,
        "host_bytes_theirs": 0,
    }  # fmt: skip
    rows = [
        {**step, "peer": peer, "selections": mode, "theirs": 30.0}
        for peer in (DELTA, STOCK) for mode in ("measured", "random")
    ]  # fmt: skip
    long = {
        "kind": "longest", "gpu_gb": 24.0, "ours": 226000, "theirs": 45000, "by_gpu_ours": 226000,
        "by_gpu_theirs": 45000, "held_ours": True, "held_theirs": True, "peer": STOCK,
    }  # fmt: skip
    lines = list(tables([{"rows": rows, "kv_dtype": "int8"}]))
    assert sum("| `DeltaCache`, int8 |" in line for line in lines) == 2
    assert sum("| `DynamicCache` |" in line for line in lines) == 1
    lines = list(tables([{"rows": rows}, {"rows": rows, "layer_graphs": True}]))
    marked = [
        line.replace("DeltaCache` |", "DeltaCache`, layer graphs |").replace(
            "OffloadedCache` |", "OffloadedCache`, layer graphs |"
        )
        for line in lines[2:7]
    ]
    assert lines[7:] == marked and sum("layer graphs" in line for line in marked) == 4
    assert "layer graphs" not in " ".join(lines[:7])
    lines = list(tables([{"rows": [*rows, long]}]))
    assert (
        "| 1 | 131,072 | measured | `DeltaOffloadedCache` | 40.0 | 3.00 GB | 16.00 GB | 0.900 |"
        in lines
    )
    assert (
        lines.count("| 1 | 131,072 | any | `DynamicCache` | 30.0 | 19.00 GB | 0.00 GB | – |") == 1
    )
    assert sum("`DeltaCache`" in line for line in lines) == 2
    assert lines[-2:] == [
        "| 24 GB | `DeltaOffloadedCache` | 226,000 | 226,000 | yes |",
        "| 24 GB | `DynamicCache` | 45,000 | 45,000 | yes |",
    ]


def test_layer_graphs_are_of_deltas_own_caches_and_replayed(call, monkeypatch):
    # The tests of engines are no package, and record on the CPU.
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "engines" / "transformers")
    pieces = importlib.import_module("hf_pieces").simulate(monkeypatch)
    seen = []
    step = bench.Bench._step

    def noted(self, cache, batch):
        before = sum(piece.replays for piece in pieces)
        seconds = step(self, cache, batch)
        made = sum(piece.replays for piece in pieces) - before
        seen.append((isinstance(cache, dd.DeltaCache), len(self.model.model.layers), made))
        return seconds

    monkeypatch.setattr(bench.Bench, "_step", noted)
    arguments = "--shape", "tiny", "--context", 300, "--steps", 2, "--rounds", 1, "--layer-graphs"
    code, out, err = call(*arguments, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["layer_graphs"] is True and result["command"].endswith(" --layer-graphs")
    layers = seen[0][1]
    # The first step of a cache runs as it is; warm-up ends behind a replay of every layer.
    of_cache = [0, *[2 * layers] * (bench.WARMUP + 1)]
    assert [made for ours, _, made in seen if ours] == 2 * of_cache
    assert {made for ours, _, made in seen if not ours} == {0}
    code, out, err = call(*arguments)
    assert code == 0 and "layer graphs: in steps from DELTA's own caches" in " ".join(out.split())
    plain = bench.run(bench.Options(TINY, TINY.plan, [1], [300], 2, ""))
    assert plain["layer_graphs"] is False


def test_prompts_go_through_the_model_in_chunks(call, monkeypatch):
    chunks = []
    update = dd.DeltaOffloadedCache.update

    def noted(self, keys, values, layer, *args, **kwargs):
        if layer == 0:
            chunks.append(keys.shape[2])
        return update(self, keys, values, layer, *args, **kwargs)

    monkeypatch.setattr(dd.DeltaOffloadedCache, "update", noted)
    arguments = "--shape", "tiny", "--context", 300, "--steps", 4, "--prompt-chunk", 128
    code, out, err = call(*arguments, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert chunks == [128, 128, 44, *[1] * 7]
    assert [row["peer"] for row in result["rows"]] == [DELTA, STOCK]
    assert [one["why"] for one in result["skipped"]] == ["Transformers' offloading needs a GPU"]
    for row in result["rows"]:
        assert row["unit"] == "s a prompt" and row["ours"] > 0 and row["theirs"] > 0
        # 307 tokens behind the last step, and an eighth more; keys and values in float32.
        assert row["host_bytes_ours"] > 307 * 2 * TINY.kv_heads * TINY.head_dim * 4
        assert row["host_bytes_theirs"] == 0 < row["step_ms_ours"]
    assert result["command"].endswith(" --prompt-chunk 128")
    lines = list(tables([result]))
    assert len(lines) == 2 + 3 and lines[2].startswith("| 300 | 128 | `DeltaOffloadedCache` | ")
    steps = {**result["rows"][0], "kind": "step", "batch": 1, "context": 300, "hit_rate": 0.5}
    steps |= {f"{place}_bytes_theirs": 1 for place in ("gpu", "host")} | {"selections": "random"}
    together = list(tables([{"rows": [steps, *result["rows"]]}]))
    assert together[4] == "" and together[5:] == lines
    code, out, err = call(*arguments)
    assert code == 0 and out.count("0.00 and") == 2


def test_some_peers_are_measured_alone(call):
    arguments = "--shape", "tiny", "--context", 100, "--steps", 1, "--rounds", 1
    for more in ((), ("--prompt-chunk", 64)):
        code, out, err = call(*arguments, *more, "--peer", "stock", "--json")
        assert code == 0, err
        result = json.loads(out)
        assert [row["peer"] for row in result["rows"]] == [STOCK] and not result["skipped"]
        assert result["command"].endswith(" --peer stock")
    code, out, err = call(*arguments, "--peer", "vllm")
    assert (code, out) == (2, "")
    assert "--peer must be one of delta, stock, stock-offloaded, got 'vllm'" in err


def test_pages_may_be_gathered_by_the_cpu(call):
    gpu = torch.device("cuda")
    for gather in (True, False):
        kind = kinds(TINY, CFG, gather=gather)[0]
        made = kind.make(bench.AutoConfig.for_model(**TINY.config()), gpu)
        assert made.shared.transfer.gather is gather
    code, out, err = call(
        "--shape", "tiny", "--context", 300, "--steps", 1, "--no-gather", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["gather"] is False


def test_texts_are_not_read_with_options_of_timed_steps(call):
    flags = (
        ("--layer-graphs",), ("--prompt-chunk", 64), ("--peer", "delta"), ("--no-gather",),
        ("--batch", 2), ("--selections", "x.json"), ("--longest", 24), ("--kv-dtype", "int8"),
    )  # fmt: skip
    for options in flags:
        code, out, err = call("--record", "embedded", *options)
        assert (code, out) == (2, "") and f"{options[0]} is for steps that are timed" in err


def test_prompts_go_without_options_of_filled_caches(call):
    for options in (("--batch", 2), ("--selections", "x.json")):
        code, out, err = call("--shape", "tiny", "--prompt-chunk", 64, *options)
        assert (code, out) == (2, "")
        assert f"{options[0]} is for caches that are filled without a prompt" in err


def test_losses_of_caches_of_eight_bits(call):
    pytest.importorskip("deltadecode_embedded")
    code, out, err = call(
        *("--eight-bits", "embedded", "--context", 300, "--steps", 2, "--texts", 1),
        *("--budget", 12, "--json"),
    )
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["kv_dtype"] for row in rows] == ["int8", "fp8"]
    for row in rows:
        assert row["added"] == pytest.approx(row["ours"] - row["theirs"], abs=1e-4)
        assert row["added"] != 0 and len(row["of_texts"]) == 1
