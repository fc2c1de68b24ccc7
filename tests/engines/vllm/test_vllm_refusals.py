"""What vLLM is not started with: one line on stderr, exit code 2, before any weight is loaded."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import environment  # of this folder

import deltadecode
from deltadecode.engines.vllm import checks
from deltadecode.engines.vllm.checks import check_machine
from deltadecode.errors import DeltaConfigError, UnsupportedCacheError
from deltadecode.lab.tasks import model_path
from deltadecode_vllm import PROPOSER

LOSSLESS = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 4}
WORDS = {
    "unknown key": ({"budget": 3}, {}, "unknown key 'budget'"),
    "wrong type": ({"budget_pages": "64"}, {}, "budget_pages must be an int, got '64'"),
    "wrong sync": ({"sync_heads": 1}, {}, "sync_heads must be true or false, got 1"),
    "wrong minimum": (
        {"min_tokens": "4k"},
        {},
        "min_tokens must be an int of at least 0, got '4k'",
    ),
    "no object": ([1], {}, "additional_config.deltadecode must be an object, got [1]"),
    "bad rule": ({"budget_pages": 8}, {}, "budget_pages must be greater than recent_pages"),
    "a folder for a plan": ({"plan": "/"}, {}, "cannot read a DeltaConfig from '/'"),
    "no plan file": ({"plan": "/no/such.json"}, {}, "cannot read a DeltaConfig"),
    "layer out of range": ({"delta_layers": [0, 99]}, {}, "must be in 0..23"),
    "cache dtype": (
        {},
        {"kv_cache_dtype": "fp8_e5m2"},
        "--kv-cache-dtype must be auto, bfloat16, float16, fp8 or fp8_e4m3 with DELTA, got fp8_e5",
    ),
    "another cache dtype": (
        {},
        {"kv_cache_dtype": "bfloat16"},
        "--kv-cache-dtype must be auto, fp8 or that of the model with DELTA, float32, got bfloat16",
    ),
    "scales of heads": (
        {},
        {"model": "scaled_heads"},
        "the checkpoint has a float8 scale for each head, and DELTA takes one for all; vLLM serves "
        "it without --attention-backend CUSTOM",
    ),
    "block size": ({"page_size": 48}, {"block_size": 64}, "--block-size must be a multiple"),
    "stage": (
        {"delta_layers": [0]},
        {"pipeline_parallel_size": 2},
        "pipeline stage 1 has layers 12 to 23, and its sparse layer 12 needs Δ-layer 0 of another "
        'stage; give it its own: "delta_layers": [0, 12]',
    ),
    "stages": (
        {"delta_layers": [0, 13]},
        {"pipeline_parallel_size": 4},
        "pipeline stage 1 has layers 6 to 11, and its sparse layer 6 needs Δ-layer 0 of another "
        'stage; give it its own: "delta_layers": [0, 6, 12, 13, 18]',
    ),
    "nothing to plan": (
        {},
        {"model": "windowed"},
        'on_unsupported="stock" serves it with stock attention',
    ),
    "window of positions": (
        {},
        {"model": "long_window", "max_model_len": 513},
        "has a sliding window of 512 tokens, and --max-model-len is 513",
    ),
    "fast prefill": (
        {},
        {"kv_sharing_fast_prefill": True},
        "--kv-sharing-fast-prefill must be off with DELTA",
    ),
    "no stages": (
        {},
        {"pipeline_parallel_size": 2, "variables": {"VLLM_PP_LAYER_PARTITION": "20,20"}},
        "no pipeline stages for 24 layers: sum(partitions)=40",
    ),
    "backend of drafts": (
        {},
        {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 2,
                "attention_backend": "CUSTOM",
            }
        },
        "attention_backend of --speculative-config must be another than CUSTOM",
    ),
    "batch invariance": (
        {},
        {"variables": {"VLLM_BATCH_INVARIANT": "1"}},
        "VLLM_BATCH_INVARIANT must be off with DELTA",
    ),
    "seventeen drafts": (
        {},
        {"speculative_config": {**LOSSLESS, "num_speculative_tokens": 17}},
        "num_speculative_tokens must be in 1..16 in lossless mode, got 17",
    ),
    "drafts without our attention": (
        {},
        {"speculative_config": LOSSLESS, "chosen": False},
        "lossless.Proposer in --speculative-config needs --attention-backend CUSTOM, got none",
    ),
    "drafts of a model with windows": (
        {"on_unsupported": "stock"},
        {"model": "windowed", "speculative_config": LOSSLESS},
        "MistralConfig has no full-attention layer",
    ),
    "drafts of a model with some windows": (
        {},
        {"model": "alternating", "speculative_config": LOSSLESS},
        "full attention in 2 of 4 layers; in vLLM, lossless mode takes models with full attention",
    ),
    "drafts over stages": (
        {"delta_layers": [0, 12]},
        {"pipeline_parallel_size": 2, "speculative_config": LOSSLESS},
        "--pipeline-parallel-size must be 1 in lossless mode, whose drafts do without",
    ),
    "drafts with adapters": (
        {},
        {"enable_lora": True, "speculative_config": LOSSLESS},
        "--enable-lora must be off in lossless mode",
    ),
    "old vLLM": ({}, {"version": "0.23.1"}, "works with vLLM 0.24 to 0.32, got 0.23.1"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models whose layers all have a sliding window, of fewer tokens than positions or not."""
    folder = tmp_path_factory.mktemp("models")
    config = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 64,
        "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64,
        "max_position_embeddings": 512, "dtype": "float32",
    }  # fmt: skip
    scheme = {"num_bits": 8, "type": "float", "strategy": "attn_head", "symmetric": True}
    float8 = {
        "quant_method": "compressed-tensors", "config_groups": {}, "ignore": [],
        "kv_cache_scheme": {**scheme, "dynamic": False},
    }  # fmt: skip
    models = {
        "windowed": {"sliding_window": 64},
        "long_window": {"sliding_window": 512},
        "scaled_heads": {"sliding_window": None, "quantization_config": float8},
    }
    gemma = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2}
    models["alternating"] = {**gemma, **kinds, "sliding_window": 64, "query_pre_attn_scalar": 32}
    for name, more in models.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**config, **more}))
    return folder


@pytest.fixture(scope="module")
def said(folder, run_job):
    """Case -> exit code and what it said, all from one process."""
    cases = {
        name: {"config": config, "engine": {**engine, **_model(engine, folder)}}
        for name, (config, engine, _) in WORDS.items()
    }
    cases["stock if told"] = {
        "config": {"on_unsupported": "stock"},
        "engine": _model({"model": "windowed"}, folder),
    }
    cases["long window, stock if told"] = {
        "config": {"on_unsupported": "stock"},
        "engine": _model({"model": "long_window"}, folder) | {"max_model_len": 513},
    }
    cases["long window"] = {"config": {}, "engine": _model({"model": "long_window"}, folder)}
    cases["float8"] = {"config": {}, "engine": {"kv_cache_dtype": "fp8"}}
    cases["not chosen"] = {"config": {"budget": 3}, "engine": {"chosen": False}}
    cases["newer vLLM"] = {"config": {}, "engine": {"version": "0.33.0"}}
    cases["lossless"] = {"config": {}, "engine": {"speculative_config": LOSSLESS}}
    cases["fine"] = {"config": {"budget_pages": 32}, "engine": {}}
    return run_job("refusal_worker.py", {"cases": cases})


def _model(engine, folder):
    if "model" not in engine:
        return {}
    return {"model": str(folder / engine["model"]), "skip_tokenizer_init": True}


@pytest.mark.parametrize("case", WORDS)
def test_refused_in_one_line(said, case):
    code, stderr, _ = said[case]
    assert code == 2
    line = stderr.strip().splitlines()[-1]
    assert line.startswith("deltadecode: error: ")
    assert WORDS[case][2] in line


def platform(kind, capability=(9, 0)):
    return SimpleNamespace(
        is_cpu=lambda: kind == "cpu", is_cuda=lambda: kind == "cuda", device_name=kind,
        get_device_capability=lambda: capability,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "dtype", "words"),
    [
        (
            platform("rocm"),
            "bfloat16",
            "DELTA runs on CUDA GPUs and on CPUs, and this vLLM on rocm",
        ),
        (
            platform("cuda", (7, 5)),
            "float16",
            "compute capability 8.0 or more, got 7.5; vLLM serves",
        ),
        (platform("cuda"), "float32", "--dtype must be bfloat16 or float16 with DELTA on a GPU"),
    ],
)
def test_machines_and_types_that_the_stock_backend_lacks_are_refused(machine, dtype, words):
    with pytest.raises(DeltaConfigError, match=words):
        check_machine(machine, dtype, batch_invariant=False)


def test_machines_that_it_has_are_not():
    for machine in (platform("cpu"), platform("cuda", None), platform("cuda", (8, 0))):
        check_machine(machine, "bfloat16", batch_invariant=False)
    check_machine(platform("cpu"), "float32", batch_invariant=False)


@pytest.mark.parametrize(
    ("cache", "lacks", "words"),
    [
        (
            {"cache_dtype": "fp8", "calculate_kv_scales": True},  # of vLLM before 0.32
            None,
            "--calculate-kv-scales must be off with DELTA",
        ),
        (
            {"cache_dtype": "fp8_e4m3"},
            "needs a GPU",
            "a float8 cache needs a GPU; --kv-cache-dtype auto does without",
        ),
    ],
)
def test_float8_caches_that_stock_vllm_would_not_have_are_refused(monkeypatch, cache, lacks, words):
    monkeypatch.setattr(checks.versions, "float8_lacks", lambda config: lacks)
    config = SimpleNamespace(cache_config=SimpleNamespace(**cache), quant_config=None)
    with pytest.raises(UnsupportedCacheError, match=words):
        checks.check_cache_dtype(config, "bfloat16")


def test_a_model_with_nothing_to_plan_is_served_stock_if_told(said):
    for case in ("stock if told", "long window, stock if told"):
        code, _, chosen = said[case]
        assert (code, chosen) == (0, None)


def test_a_window_that_hides_nothing_is_planned(said):
    code, _, chosen = said["long window"]
    assert code == 0 and chosen["delta_layers"]


def test_a_newer_vllm_with_the_interface_is_started(said):
    code, _, chosen = said["newer vLLM"]
    assert code == 0 and chosen["delta_layers"]


def test_float8_caches_are_served_where_stock_vllm_has_them(said):
    code, stderr, chosen = said["float8"]
    assert code == 0 or "a float8 cache is more than vLLM computes here" in stderr
    assert code or chosen["delta_layers"]


def test_without_the_flag_nothing_is_checked(said):
    code, _, chosen = said["not chosen"]
    assert (code, chosen) == (0, None)


def test_the_plan_reaches_the_workers_resolved(said):
    code, _, chosen = said["fine"]
    assert code == 0
    assert chosen["budget_pages"] == 32
    assert (
        chosen["delta_layers"]
        == json.loads(
            next(
                iter(Path(deltadecode.__file__).parent.glob("profiles/deltadecode-chain.json"))
            ).read_text()
        )["delta_layers"]
    )


def test_the_command_line_says_one_line_and_fails():
    """As a user sees it, without the log of vLLM itself."""
    program = str(Path(sys.executable).with_name("vllm"))
    done = subprocess.run(
        [program, "serve", str(model_path()), "--attention-backend", "CUSTOM",
         "--additional-config", '{"deltadecode": {"budget": 3}}', "--dtype", "float32"],
        capture_output=True, text=True, timeout=300, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith(
            "deltadecode: error: unknown key 'budget' in additional_config.deltadecode; it has "
        )
    )
