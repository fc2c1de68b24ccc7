"""CLSA in vLLM on a GPU: graphs of whole decode steps give the tokens of Transformers.

``pytest -m gpu tests/gpu/test_gpu_vllm_clsa.py``
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from deltadecode_clsa import model_path
from needle_prompts import needles
from test_gpu_vllm import plugin_path, said
from test_gpu_vllm import pytestmark as pytestmark
from transformers import AutoTokenizer

MODES = ("clsa", "yoco", "transformer")
WORKER = Path(__file__).parents[1] / "engines" / "vllm" / "clsa_worker.py"
# More rows than the smallest graphs have, lengths on both sides of k, of a window and of a block.
LENGTHS = (1, 5, 63, 64, 65, 130, 300, 513, 700, 900, 257, 31, 1100)
PROMPTS = [
    [(place * place + 5 * place + start) % 64 for place in range(length)]
    for start, length in enumerate(LENGTHS)
]
SHAPE = {"max_position_embeddings": 2048, "sliding_window": 40, "index_topk": 64}
ENGINE = {
    "enforce_eager": False, "max_model_len": 2048, "max_num_seqs": 16, "block_size": 16,
    "max_num_batched_tokens": 256, "enable_prefix_caching": True, "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 2**28,
}  # fmt: skip
# FlashAttention has no float32.
HALF = {"dtype": "bfloat16"}
# Fewer tokens than the shipped model's index selects, more, and more than its window has.
ASKED, CODES = zip(*(needles(facts, 1, facts)[0] for facts in (3, 36, 110)), strict=True)
RUNS = {
    **{f"{mode} graphs": {"mode": mode, "rounds": 2} for mode in MODES},
    "clsa eager": {"mode": "clsa", "engine": {"enforce_eager": True}},
    "half graphs": {"mode": "clsa", "engine": HALF},
    "half eager": {"mode": "clsa", "engine": {**HALF, "enforce_eager": True}},
    "shipped": {
        "path": str(model_path()), "engine": HALF,
        "prompts": AutoTokenizer.from_pretrained(model_path())(list(ASKED))["input_ids"],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("clsa"), {}
    env = {
        **os.environ, "PYTHONPATH": plugin_path(folder), "VLLM_LOGGING_LEVEL": "WARNING",
        # vLLM's kernels leave it to Triton how to multiply float32, which would be TF32.
        "TRITON_F32_DEFAULT": "ieee",
    }  # fmt: skip
    # An engine gives its memory back with its process.
    for name, run in RUNS.items():
        job = {
            "folder": str(folder), "prompts": PROMPTS, "max_tokens": 80, "engine": ENGINE,
            "shape": SHAPE, "runs": {name: run},
            "reference": [mode for mode in {run.get("mode")} - {None} if mode not in found],
            "judged": [name] if name.startswith("half") else [],
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(job))
        done = subprocess.run(
            [sys.executable, str(WORKER), "job.json", "out.json"], cwd=folder, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, said(done.stdout)
        found |= json.loads((folder / "out.json").read_text())
        assert "error" not in found[name], found[name]["error"] + said(done.stdout)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("round_", [0, 1])
def test_graphs_give_the_tokens_of_transformers(ran, mode, round_):
    assert ran[f"{mode} graphs"]["tokens"][round_] == ran[mode]["tokens"]


@pytest.mark.parametrize("mode", MODES)
def test_whole_steps_are_in_graphs_and_prefixes_are_cached(ran, mode):
    found = ran[f"{mode} graphs"]
    assert found["graphs"] == "FULL_DECODE_ONLY"
    assert found["captured"] > 0
    assert max(found["cached"][1]) >= 1024


def test_eager_steps_give_them_too(ran):
    assert ran["clsa eager"]["captured"] == 0
    assert ran["clsa eager"]["tokens"][0] == ran["clsa"]["tokens"]


def test_in_bfloat16_graphs_are_as_right_as_eager_steps(ran):
    # Rounding makes other tokens of near ties, and graphs are of other sizes: no two runs agree.
    graphs, eager = ran["half graphs"]["lost"], ran["half eager"]["lost"]
    assert eager < 0.05
    assert graphs < 2 * eager + 0.02


def test_the_shipped_model_finds_needles_in_bfloat16(ran):
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    lengths = [len(prompt) for prompt in RUNS["shipped"]["prompts"]]
    assert lengths[0] < 256 < lengths[1] < 512 < lengths[2]
    assert ran["shipped"]["captured"] > 0
    written = tokenizer.batch_decode(ran["shipped"]["tokens"][0])
    assert [text.split("<eos>")[0].strip() for text in written] == list(CODES)
