"""Switching DELTA on and off, and models that are loaded with it."""

import copy
import gc
import importlib
import inspect
import io
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tiny import COMMON, FAMILIES, GREEDY, generate, make_model, make_prompt, small_config
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    Gemma3Config,
    PreTrainedModel,
)

import deltadecode as dd
from deltadecode.engines.on_import import on_import
from deltadecode.engines.transformers import bind
from deltadecode.engines.transformers.attention import delta_attention

PROMPT, STEPS = 23, 12


def logits(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    return torch.cat(generate(model, make_prompt(PROMPT), STEPS, **options).logits)


def attributes(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that enabling could leave behind."""
    return {
        name: (set(vars(part)), dict(part._forward_pre_hooks), part.config._attn_implementation)
        for name, part in model.named_modules()
        if isinstance(part, PreTrainedModel)
    }


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_disable_restores_everything(family: str, attention: str) -> None:
    model = make_model(family, attention)
    before, expected = attributes(model), logits(model)
    dd.enable(model, small_config(family))
    assert model.config._attn_implementation == "delta"
    assert not torch.equal(logits(model), expected)
    dd.disable(model)
    assert attributes(model) == before
    assert torch.equal(logits(model), expected)
    dd.disable(model)  # again: nothing to do
    cache = generate(model, make_prompt(3), 2).past_key_values
    assert type(cache) is DynamicCache
    with pytest.raises(ValueError, match=type(model).__name__):
        dd.stats(model)


def test_enable_again_takes_the_new_plan_and_disable_still_restores() -> None:
    model = make_model("llama", "eager")
    dd.enable(model, small_config())
    logits(model)
    old = dd.stats(model)
    dd.enable(model, small_config(budget_pages=6))
    assert dd.stats(model).steps == 0
    assert old.steps == STEPS - 1
    fresh = make_model("llama", "sdpa")
    dd.enable(fresh, small_config(budget_pages=6))
    assert torch.equal(logits(model), logits(fresh))
    dd.disable(model)
    assert model.config._attn_implementation == "eager"


def test_another_implementation_set_meanwhile_is_left_in_peace() -> None:
    model = make_model("llama", "sdpa")
    expected = logits(model)
    dd.enable(model, small_config())
    with_delta = logits(model)
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model), expected)
    assert type(generate(model, make_prompt(3), 2).past_key_values) is DynamicCache
    model.set_attn_implementation("delta")
    assert torch.equal(logits(model), with_delta)


def test_disable_forgets_the_plan() -> None:
    model = make_model("llama", "sdpa")
    dd.enable(model, small_config())
    logits(model)
    dd.disable(model)
    model.set_attn_implementation("delta")
    assert dd.stats(model).steps == 0
    assert bind.find_state(model).cfg == dd.DeltaConfig.for_model(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model("llama", "sdpa", max_position_embeddings=2048).save_pretrained(path)
    return path


def test_loaded_by_name_equals_enabled_with_the_plan_for_the_model(saved: Path) -> None:
    prompt = make_prompt(1200)  # the default budget is 1,024 tokens
    runs = []
    for attention in ("delta", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(saved, attn_implementation=attention)
        if attention == "sdpa":
            dd.enable(model)
        runs.append(generate(model, prompt, 4))
        assert isinstance(runs[-1].past_key_values, dd.DeltaCache)
        assert dd.stats(model).attended_fraction < 1
    assert torch.equal(torch.cat(runs[0].logits), torch.cat(runs[1].logits))
    assert torch.equal(runs[0].sequences, runs[1].sequences)


def test_loaded_by_name_then_disabled_is_stock(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, attn_implementation="delta")
    assert dd.stats(model).steps == 0  # known before the first use
    dd.disable(model)
    stock = AutoModelForCausalLM.from_pretrained(saved)
    assert attributes(model) == attributes(stock)
    assert torch.equal(logits(model), logits(stock))


def test_a_plan_given_to_a_model_loaded_by_name(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, attn_implementation="delta")
    dd.enable(model, small_config())
    other = AutoModelForCausalLM.from_pretrained(saved)
    dd.enable(other, small_config())
    assert torch.equal(logits(model), logits(other))


def test_nothing_of_delta_is_saved(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, attn_implementation="delta")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == (saved / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def make_multimodal(attention: str) -> PreTrainedModel:
    _, text = FAMILIES["gemma3"]
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = Gemma3Config(
        text_config={**COMMON, **text},
        vision_config={**vision, "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_id=60,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    return model.eval()


def test_the_text_part_of_a_multimodal_model() -> None:
    prompt = make_prompt(PROMPT) % 60
    prompt[0, 4:8] = 60
    inputs = {
        "input_ids": prompt,
        "pixel_values": torch.randn(1, 3, 16, 16),
        "token_type_ids": (prompt == 60).long(),
        **GREEDY,
    }
    enabled, loaded = make_multimodal("sdpa"), make_multimodal("delta")
    before = attributes(enabled)
    full = torch.cat(enabled.generate(**inputs, max_new_tokens=STEPS).logits)
    runs = []
    for model in (enabled, loaded):
        dd.enable(model, small_config("gemma3"))
        runs.append(torch.cat(model.generate(**inputs, max_new_tokens=STEPS).logits))
        assert dd.stats(model).steps == STEPS - 1
    assert enabled.config.vision_config._attn_implementation == "sdpa"
    assert torch.equal(*runs)
    assert not torch.allclose(runs[0], full, atol=0.1)
    dd.disable(enabled)
    assert attributes(enabled) == before
    dd.disable(loaded)
    assert attributes(loaded) == before


def test_the_inner_model_alone_is_enabled_too() -> None:
    model = make_model("llama", "sdpa")
    dd.enable(model, small_config())
    with torch.no_grad():
        out = model.model(make_prompt(PROMPT))
        model.model(make_prompt(1), past_key_values=out.past_key_values)
    assert isinstance(out.past_key_values, dd.DeltaCache)
    assert dd.stats(model).steps == 1


def test_positional_arguments_of_forward() -> None:
    model = make_model("llama", "sdpa")
    dd.enable(model, small_config())
    with torch.no_grad():
        named = model(make_prompt(PROMPT))
        cache = model(make_prompt(PROMPT), None).past_key_values
        place = torch.tensor([[PROMPT]])
        got = model(make_prompt(1), None, place, cache)
        assert got.past_key_values is cache
        expected = model(make_prompt(1), past_key_values=named.past_key_values)
    assert torch.equal(got.logits, expected.logits)


def _pickled(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
def test_copies_go_on_with_the_same_plan_and_their_own_counts(copied: Any) -> None:
    model = make_model("llama", "sdpa")
    dd.enable(model, small_config())
    expected = logits(model)
    twin = copied(model)
    assert torch.equal(logits(twin), expected)
    # The last chunk of a single token: the replaced methods came along too.
    torch.testing.assert_close(logits(twin, prefill_chunk_size=11), expected, atol=1e-3, rtol=0)
    assert dd.stats(twin).steps == 2 * (STEPS - 1)
    assert dd.stats(model).steps == STEPS - 1
    dd.disable(model)
    assert torch.equal(logits(twin), expected)
    dd.disable(twin)
    assert twin.config._attn_implementation == "sdpa"


def test_a_model_is_freed_as_promptly_as_without_delta() -> None:
    gc.collect()
    gc.disable()
    try:
        freed = []
        for delta in (False, True):
            model = make_model("llama", "sdpa")
            if delta:
                dd.enable(model, small_config())
                state = weakref.ref(bind.find_state(model))
            generate(model, make_prompt(3), 2)
            weak = weakref.ref(model)
            del model
            freed.append(weak() is None)
        assert freed[1] == freed[0]
        gc.collect()
        assert state() is None
    finally:
        gc.enable()


def test_two_threads_may_decode_with_one_model() -> None:
    model = make_model("llama", "sdpa")
    dd.enable(model, small_config())
    prompts = [make_prompt(PROMPT, seed=seed) for seed in range(2)]
    expected = [generate(model, prompt, 30).sequences for prompt in prompts]
    got: dict[int, torch.Tensor] = {}

    def run(place: int) -> None:
        got[place] = generate(model, prompts[place], 30).sequences

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[place], expected[place]) for place in range(2))


def test_generate_keeps_its_signature() -> None:
    model = make_model("llama", "sdpa")
    before = inspect.signature(model.generate)
    dd.enable(model, small_config())
    assert inspect.signature(model.generate) == before
    assert model.generate.__doc__ == type(model).generate.__doc__


def test_a_compiled_step_gives_the_same_numbers_and_counts() -> None:
    model = make_model("llama", "sdpa", num_hidden_layers=2)
    dd.enable(model, small_config(dense_layers=(), delta_layers=(0,)))
    modules = [layer.self_attn for layer in model.model.layers]

    def run(attend: Any) -> torch.Tensor:
        cache, random = dd.DeltaCache(model.config), torch.Generator().manual_seed(0)

        def states(heads: int, tokens: int) -> torch.Tensor:
            return torch.randn(1, heads, tokens, 8, generator=random)

        for layer in range(2):
            cache.update(states(2, 30), states(2, 30), layer)
        return torch.cat([attend(cache, states(4, 1), states(2, 1)) for _ in range(3)])

    def attend(cache: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        for layer, module in enumerate(modules):
            out, _ = delta_attention(module, q, *cache.update(k, k, layer), None, scaling=0.3)
            q = q + out.transpose(1, 2)
        return q

    expected = run(attend)
    assert torch.equal(run(torch.compile(attend, backend="eager")), expected)
    assert dd.stats(model).steps == 6
    assert dd.stats(model).attended_fraction < 1


SCRIPT = """
import sys
import deltadecode
assert not {"torch", "transformers"} & set(sys.modules)
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
assert "delta" in AttentionInterface()
config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=4,
                     num_attention_heads=2)
config._attn_implementation = "delta"
print(deltadecode.stats(LlamaForCausalLM(config)).attended_fraction)
"""


def test_importing_the_package_registers_delta_and_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(Path(dd.__file__).parents[1]), "HF_HUB_OFFLINE": "1"},
    )
    assert (done.returncode, done.stdout) == (0, "1.0\n"), done.stderr


def test_a_callback_runs_once_after_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_module_of_this_test.py").write_text("value = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []
    finders = list(sys.meta_path)

    def callback() -> None:
        seen.append(importlib.import_module("a_module_of_this_test").value)

    on_import("a_module_of_this_test", callback)
    importlib.import_module("string")
    assert seen == []
    importlib.import_module("a_module_of_this_test")
    importlib.import_module("a_module_of_this_test")
    assert seen == [7]
    assert sys.meta_path == finders
    on_import("a_module_of_this_test", callback)  # already imported: at once
    assert seen == [7, 7]


def test_names_that_the_package_does_not_have() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dd.nothing
    assert {"enable", "disable", "stats", "DeltaCache", "DeltaConfig"} <= set(dir(dd))


def test_an_unpickled_cache_goes_on() -> None:
    model = make_model("llama", "sdpa")
    dd.enable(model, small_config())
    with torch.no_grad():
        cache = model(make_prompt(PROMPT)).past_key_values
        twin = pickle.loads(pickle.dumps(cache))
        one, two = (model(make_prompt(1), past_key_values=c).logits for c in (cache, twin))
    assert torch.equal(one, two)
