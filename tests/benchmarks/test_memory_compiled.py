"""Norms and MLPs that the memory benchmark compiles in place, and decoding with them."""

import copy
import json
from functools import partial

import pytest
import torch
from docs_pages import read
from torch._dynamo import config as dynamo
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import deltadecode as dd
from benchmarks.command import launch
from benchmarks.e2e.shapes import find_shape
from benchmarks.memory import compiled
from benchmarks.memory import run as bench
from benchmarks.memory.__main__ import memory
from benchmarks.memory.compiled import compile_parts, parts_of
from deltadecode.engines.transformers.offload_host import Transfer

TINY = find_shape("tiny")
CFG = dd.DeltaConfig(
    page_size=4, budget_pages=5, recent_pages=2, sink_pages=1, dense_layers=(0,),
    delta_layers=(1, 3),
)  # fmt: skip
NORMS = {"input_layernorm", "post_attention_layernorm"}


def make(kind, layers=6):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, vocab_size=61,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.4,
        eos_token_id=None, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture
def counter(monkeypatch):
    """Compiles without a C++ compiler, and counts graphs."""
    made = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiled, "BACKEND", made)
    with dynamo.patch(recompile_limit=8):  # what is set in it is put back
        yield made
    torch._dynamo.reset()


@pytest.fixture
def call(outcome):
    steps = ("--shape", "tiny", "--context", 300, "--steps", 2, "--rounds", 1, "--compile")
    return lambda *arguments: outcome(partial(launch, memory), *steps, *arguments)


@pytest.mark.parametrize(
    "kind, of_layer, of_attention",
    [
        ("llama", NORMS, set()),
        ("qwen3", NORMS, {"q_norm", "k_norm"}),
        (
            "gemma3_text",
            NORMS | {"pre_feedforward_layernorm", "post_feedforward_layernorm"},
            {"q_norm", "k_norm"},
        ),
        ("phi3", NORMS, set()),
    ],
)
def test_parts_are_the_norms_and_mlps_of_every_layer(kind, of_layer, of_attention):
    names = {"mlp", *of_layer} | {f"self_attn.{name}" for name in of_attention}
    assert set(parts_of(make(kind))) == {
        f"model.layers.{layer}.{name}" for layer in range(6) for name in names
    }


def test_layers_share_graphs_and_steps_make_no_more(counter):
    model = make("qwen3", layers=36)
    compile_parts(model, [1, 2, 3])
    # Norms of the hidden state, of queries and of keys, and the MLP: for each batch.
    assert counter.frame_count == 4 * 3
    for batch in (1, 2, 3):
        for make_cache in (
            lambda: DynamicCache(config=model.config),
            lambda: dd.DeltaCache(model.config),
            lambda: dd.DeltaOffloadedCache(model.config, CFG, transfer=Transfer()),
        ):
            cache = make_cache()
            if type(cache) is DynamicCache:
                dd.disable(model)
            else:
                dd.enable(model, CFG)
            for layer in range(36):
                states = torch.randn(2, batch, 2, 60, 8)
                cache.update(*states, layer)
            for _ in range(6):
                with torch.no_grad():
                    model(torch.ones(batch, 1, dtype=torch.long), past_key_values=cache)
    assert counter.frame_count == 4 * 3


@pytest.mark.parametrize("offloaded", [False, True])
def test_delta_decodes_the_same_tokens_with_compiled_parts(counter, offloaded):
    plain = make("qwen3")
    changed = copy.deepcopy(plain)
    compile_parts(changed, [2])
    prompt = torch.randint(2, 61, (2, 50), generator=torch.Generator().manual_seed(1))
    found = []
    for model in (plain, changed):
        dd.enable(model, CFG)
        cache = (
            dd.DeltaOffloadedCache(model.config, CFG, transfer=Transfer())
            if offloaded
            else dd.DeltaCache(model.config)
        )
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits = model(prompt, past_key_values=cache).logits[:, -1:]
        tokens, seen = [logits.argmax(-1)], [logits]
        for _ in range(30):
            with torch.no_grad():
                seen.append(model(tokens[-1], past_key_values=cache).logits)
            tokens.append(seen[-1].argmax(-1))
        found.append((torch.cat(tokens, 1), torch.cat(seen, 1), dd.stats(model).per_layer))
    (tokens, logits, stats), (compiled_tokens, compiled_logits, compiled_stats) = found
    assert torch.equal(compiled_tokens, tokens) and compiled_stats == stats
    torch.testing.assert_close(compiled_logits, logits)
    assert any(layer.attended_tokens < layer.full_tokens for layer in stats)
    assert counter.frame_count == 4


def test_a_compiled_run_says_so(call, counter):
    code, out, err = call("--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["compiled"] is True and result["command"].endswith(" --compile")
    assert counter.frame_count == 2
    code, out, err = call()
    assert code == 0 and "compiled: norms and MLPs of the model" in " ".join(out.split())
    plain = bench.run(bench.Options(TINY, TINY.plan, [1], [300], 2, ""))
    assert plain["compiled"] is False


def test_a_run_without_a_compiler_fails_in_one_line(call, counter, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nat all")

    refused = "deltadecode: error: norms and MLPs cannot be compiled: "
    monkeypatch.setattr(compiled, "BACKEND", broken)
    code, out, err = call()
    assert (code, out) == (2, "") and "no compiler" in err
    assert err.splitlines()[-1].startswith(refused)
    with dynamo.patch(disable=True):
        code, out, err = call()
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == refused + "PyTorch's compiler is switched off"


def test_texts_are_not_read_with_compiled_parts(call):
    code, out, err = call("--record", "embedded")
    assert (code, out) == (2, "") and "--compile is for steps that are timed" in err


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_the_page_compiles_the_same_parts(kind):
    (block,) = (
        block.text
        for block in read("docs/transformers.md").blocks
        if block.language == "python" and ".compile(" in block.text
    )
    model = make(kind)
    exec(block, {"model": model})
    changed = {name for name, part in model.named_modules() if part._compiled_call_impl}
    assert changed == set(parts_of(model))
