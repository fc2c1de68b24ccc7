"""The CLSA benchmark on a tiny shape: every mode, every case, every part of a layer."""

import json
from functools import partial

import pytest

from benchmarks.clsa.__main__ import clsa
from benchmarks.clsa.run import _SMALL, Cell
from benchmarks.clsa.serving import blocks
from benchmarks.command import launch
from benchmarks.e2e.workloads import PACE_STEPS
from deltadecode.models.clsa import ClsaConfig


@pytest.fixture
def run(outcome):
    return partial(outcome, partial(launch, clsa))


def test_all_modes_are_measured(run):
    code, out, _ = run(
        "--small", "--device", "cpu", "--context", 96, "--new-tokens", 8, "--steps", 2,
        "--batch", 1, "--batch", 2, "--json",
    )  # fmt: skip
    assert code == 0
    found = json.loads(out)
    assert [(row["case"], row["peer"]) for row in found["rows"]] == [
        (f"{case}, 96 tokens", peer)
        for peer in ("transformer", "yoco")
        for case in ("prefill", "decode", "end to end", "cache")
    ]
    assert found["rows"][3]["ratio"] == pytest.approx(4 * 2 * 64 / (2 * 64 + 32), abs=0.01)
    assert [set(cell["decode_by_batch"]) for cell in found["cells"]] == [{"1", "2"}] * 3
    assert len(found["layer_ms"]["96"]) == 6


class Engine:
    """An engine with room for 800 blocks of 16 tokens, whose steps take 10 ms."""

    def __init__(self, side, spec, command):
        self.mode, self.asked, self.longest = side, [], spec["longest"]

    def ready(self):
        return {"blocks": 800, "block_size": 16}

    def do(self, command):
        self.asked.append(command["do"])
        if command["do"] == "fill":
            # While the last prompts are read, in chunks, the first rows write a token a chunk.
            chunks = command["batch"] * command["prompt"] / 2048
            assert command["new_tokens"] >= chunks + 2 + PACE_STEPS
            assert command["prompt"] + command["new_tokens"] <= self.longest
        return {"seconds": [0.01, 0.01] if command["do"] == "steps" else 0.5, "preemptions": 0}

    def stop(self):
        assert self.asked[-3:] == ["fill", "steps", "drop"]


def test_vllm_is_timed_with_the_batches_that_fit(run, monkeypatch):
    monkeypatch.setattr("benchmarks.clsa.serving.Process", Engine)
    monkeypatch.setattr("benchmarks.e2e.run.has_vllm", lambda: True)
    code, out, _ = run(
        "--vllm", "--small", "--context", 4096, "--new-tokens", 96, "--steps", 2,
        *(f"--batch={batch}" for batch in (1, 2, 3, 4)), "--json",
    )  # fmt: skip
    assert code == 0
    cells = {cell["mode"]: cell for cell in json.loads(out)["cells"]}
    # Of 256 blocks for all tokens, 64 for index keys, and 4 for each window.
    assert blocks(make_config("clsa"), 4096, 16) == 256 + 64 + 2 * 4
    assert {mode: cell["batch"] for mode, cell in cells.items()} == {
        "clsa": 2, "yoco": 3, "transformer": 3,
    }  # fmt: skip
    assert cells["clsa"]["decode_tokens_per_s"] == pytest.approx(200)
    assert cells["clsa"]["prefill_tokens_per_s"] == pytest.approx(8000)


def make_config(mode):
    return ClsaConfig(mode=mode, **_SMALL)


def test_end_to_end_is_prefill_and_steps():
    cell = Cell(prefill=1000.0, decode=40.0, batch=4, step_ms=100.0, kv_bytes=1.0, tried={})
    # 4 prompts of 900 tokens take 3.6 s, 100 steps take 10 s.
    assert cell.end_to_end(1000, 100) == pytest.approx(4000 / 13.6)
    assert cell.written(1000, 100) == pytest.approx(400 / 13.6)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--mode", "dense"], "--mode must be one of clsa, yoco, transformer"),
        (["--context", "64"], "--context must exceed --new-tokens"),
        (["--device", "gpu"], "--device must be one of cpu"),
        (["--vllm"], "vLLM is not installed"),
    ],
)
def test_bad_input_is_refused(run, monkeypatch, options, message):
    monkeypatch.setattr("benchmarks.e2e.run.has_vllm", lambda: False)
    code, _, err = run(*options)
    assert (code, err.count("\n")) == (2, 1) and message in err
