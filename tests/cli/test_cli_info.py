"""``deltadecode info``: versions, backends and the plan of a model."""

import importlib.util
import json

import torch
from transformers import AutoConfig

from deltadecode.cli.info import ranges
from deltadecode.engines.transformers.packing import packed_bytes


def test_info_shows_versions_and_the_plan(run, model):
    code, out, err = run("info", model)
    assert (code, err) == (0, "")
    assert torch.__version__ in out
    assert "default plan" in out
    assert "the pages that layer 4 selects" in out


def test_info_json(run, model):
    found = json.loads(run("info", model, "--json")[1])
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0] == "cpu"
    triton = {"triton"} if importlib.util.find_spec("triton") else set()
    assert {"reference", "torch"} | triton == set(found["backends"])
    by_role = {
        (entry["role"], entry["source"]): entry["layers"] for entry in found["model"]["roles"]
    }
    assert by_role == {
        ("dense", None): [0, 1],
        ("delta", None): [2, 4],
        ("sparse", 2): [3],
        ("sparse", 4): [5],
    }
    assert "model" not in json.loads(run("info", "--json")[1])


def test_info_says_what_a_cache_needs(run, model):
    code, out, _ = run("info", model, "--context", "2000")
    assert code == 0
    assert "cache of a sequence of 2,000 tokens" in out
    found = json.loads(run("info", model, "--context", "2000", "--json")[1])["model"]
    config = AutoConfig.from_pretrained(model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_token = 2 * config.num_key_value_heads * head_dim * config.dtype.itemsize
    pool = (2 * found["config"]["budget_pages"] + 1) * found["config"]["page_size"]
    assert found["cache"] == {
        "tokens": 2000,
        "device": 6 * 2000 * of_token,
        "offloaded_device": (4 * 2000 + 2 * pool) * of_token,
        "offloaded_host": 2 * 2000 * of_token,
    }
    eight = json.loads(run("info", model, "--context", "2000", "--kv-dtype", "int8", "--json")[1])
    packed = 2 * packed_bytes(config.num_key_value_heads, head_dim)
    assert eight["model"]["cache"]["device"] == 6 * 2000 * packed < found["cache"]["device"]
    short = json.loads(run("info", model, "--context", "700", "--json")[1])["model"]["cache"]
    assert short["device"] == short["offloaded_device"]
    assert short["offloaded_host"] == 0


def test_info_leaves_out_an_offloaded_cache_that_is_refused(run, model, tmp_path):
    described = json.loads(run("info", model, "--json")[1])["model"]
    assert described["offload_refused"] is None
    AutoConfig.for_model("gemma3n_text").save_pretrained(tmp_path)
    code, out, _ = run("info", tmp_path, "--context", "4000")
    assert code == 0
    line = next(line for line in out.splitlines() if "4,000 tokens" in line)
    assert line.endswith("on the GPU") and "offloaded" not in line
    assert "no offloaded cache: layers that read the keys of others cannot be offloaded" in out
    described = json.loads(run("info", tmp_path, "--context", "4000", "--json")[1])["model"]
    cache = described["cache"]
    assert cache["device"] and (cache["offloaded_device"], cache["offloaded_host"]) == (None, None)
    assert "num_kv_shared_layers=15" in described["offload_refused"]


def test_info_counts_no_bytes_of_a_cache_that_is_refused(run, tmp_path):
    AutoConfig.for_model("gemma3n_text").save_pretrained(tmp_path)
    options = "--context", "4000", "--kv-dtype", "int8"
    code, out, _ = run("info", tmp_path, *options)
    assert code == 0
    assert "4,000 tokens" not in out
    assert "no cache of int8: layers that read the keys of others cannot be stored in" in out
    described = json.loads(run("info", tmp_path, *options, "--json")[1])["model"]
    assert described["cache"] is None
    assert described["cache_refused"] == described["offload_refused"]
    described = json.loads(run("info", tmp_path, "--context", "4000", "--json")[1])["model"]
    assert described["cache_refused"] is None


def test_info_says_that_a_context_is_longer_than_the_models_positions(run, model):
    out = run("info", model, "--context", "2000")[1]
    assert "2,000 tokens are more than the model's 128 positions\n" in out
    described = json.loads(run("info", model, "--context", "2000", "--json")[1])["model"]
    assert (described["positions"], described["beyond_positions"]) == (128, True)
    for options in ([], ["--context", "128"]):
        assert "positions" not in run("info", model, *options)[1]
        described = json.loads(run("info", model, *options, "--json")[1])["model"]
        assert (described["positions"], described["beyond_positions"]) == (128, False)


def test_ranges():
    assert ranges([0, 1, 3, 4, 5, 9]) == "0, 1, 3-5, 9"
