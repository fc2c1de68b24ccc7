"""Ordinary ways of using a model: wrappers, copies, autocast, gradients, export."""

import copy
import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_tiny import generate, make_model, make_prompt, small_config, stock_name
from torch import nn
from transformers import DynamicCache, PreTrainedModel

import deltadecode as dd

PROMPT, STEPS = 23, 12


def enabled(family: str = "llama", **changes: Any) -> PreTrainedModel:
    model = make_model(family, stock_name(family))
    dd.enable(model, small_config(family, **changes))
    return model


def logits(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    return torch.cat(generate(model, make_prompt(PROMPT), STEPS, **options).logits)


# Autocast


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("kind", [None, "static"])
def test_autocast_with_weights_of_float32(family: str, kind: str | None) -> None:
    model = make_model(family, stock_name(family), initializer_range=0.1)
    dd.enable(model, small_config(family))
    expected = generate(model, make_prompt(PROMPT), STEPS)
    counts = dd.stats(model).attended_tokens
    dd.stats(model).reset()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = generate(model, make_prompt(PROMPT), STEPS, cache_implementation=kind)
    assert dd.stats(model).attended_tokens == counts
    held = out.past_key_values.layers[1]
    assert held.keys.dtype == held.values.dtype == torch.bfloat16
    assert torch.equal(out.logits[0].argmax(), expected.logits[0].argmax())
    torch.testing.assert_close(out.logits[0], expected.logits[0], atol=0.1, rtol=0.1)


def test_autocast_within_the_budget_gives_the_tokens_of_stock() -> None:
    model = make_model("llama", "sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(model, make_prompt(PROMPT), STEPS)
        dd.enable(model, small_config(budget_pages=64))
        got = generate(model, make_prompt(PROMPT), STEPS)
    assert torch.equal(got.sequences, expected.sequences)


def test_an_evaluation_in_half_precision_that_continues_a_cache_of_float32() -> None:
    model = enabled()
    with torch.no_grad():
        cache = model(make_prompt(30)).past_key_values
        with torch.autocast("cpu", torch.bfloat16):
            for token in range(3):
                step = model(make_prompt(1, seed=token), past_key_values=cache)
    assert step.logits.isfinite().all()
    assert dd.stats(model).steps == 3


# Wrappers


class FakePeft(nn.Module):
    """As PEFT wraps a model: ``get_base_model`` gives it, ``base_model.model`` holds it."""

    def __init__(self, model: PreTrainedModel, kind: str = "PeftType.LORA") -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model
        self.peft_config = {"default": SimpleNamespace(peft_type=kind)}

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model().generate(*args, **kwargs)


class FakeMixedPeft(FakePeft):
    """As PEFT wraps a model with adapters of several kinds."""

    get_base_model = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "wrap",
    [
        FakePeft,
        FakeMixedPeft,
        nn.DataParallel,
        torch.compile,
        lambda model: torch.compile(FakePeft(model)),
    ],
    ids=["peft", "mixed peft", "data parallel", "compile", "compiled peft"],
)
def test_wrappers_are_looked_through(wrap: Any) -> None:
    model = make_model("llama", "sdpa")
    wrapped = wrap(model)
    dd.enable(wrapped, small_config())
    logits(model)
    assert dd.stats(wrapped).steps == dd.stats(model).steps == STEPS - 1
    dd.disable(wrapped)
    assert model.config._attn_implementation == "sdpa"


def test_prefix_tuning_is_named() -> None:
    model = make_model("llama", "sdpa")
    wrapped = FakePeft(model, "PeftType.PREFIX_TUNING")
    with pytest.raises(dd.UnsupportedModelError, match="prefix tuning"):
        dd.enable(wrapped, small_config())
    assert model.config._attn_implementation == "sdpa"
    dd.enable(model, small_config())
    with pytest.raises(dd.UnsupportedCacheError, match="prefix tuning"):
        generate(model, make_prompt(3), 4, past_key_values=DynamicCache())
    dd.disable(wrapped)
    assert model.config._attn_implementation == "sdpa"


# Copies, shared configurations, dropped models


def test_a_model_whose_configuration_is_replaced_by_a_copy() -> None:
    model = enabled()
    expected = logits(model)
    for part in (model, model.model):
        part.config = copy.deepcopy(part.config)
        dd.stats(model).reset()
        assert torch.equal(logits(model), expected)
        assert dd.stats(model).steps == STEPS - 1
    before = make_model("llama", "sdpa")
    other = copy.deepcopy(before.config)
    dd.enable(before, small_config())
    before.config = other  # says nothing of DELTA
    assert torch.equal(logits(before), expected)
    assert dd.stats(before).steps == STEPS - 1
    dd.disable(before)
    assert not torch.equal(logits(before), expected)


def test_two_models_of_one_configuration_object() -> None:
    first = make_model("llama", "sdpa")
    torch.manual_seed(1)
    second = type(first)(first.config).eval()
    stock = logits(second)
    dd.enable(first, small_config())
    expected = logits(first)
    # Not enabled: full attention, which rounds as its own function does.
    torch.testing.assert_close(logits(second), stock, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="not enabled"):
        dd.stats(second)
    dd.enable(second, small_config(budget_pages=6))
    logits(second)
    assert dd.stats(first).steps == dd.stats(second).steps == STEPS - 1
    assert torch.equal(logits(first), expected)


def test_two_models_of_one_configuration_object_are_disabled_one_by_one() -> None:
    first = make_model("llama", "eager")
    torch.manual_seed(1)
    second = type(first)(first.config).eval()
    stock = logits(first)
    dd.enable(first, small_config())
    dd.enable(second, small_config())
    expected = logits(second)
    dd.disable(first)
    assert torch.equal(logits(second), expected)
    assert dd.stats(second).steps == 2 * (STEPS - 1)
    torch.testing.assert_close(logits(first), stock, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="not enabled"):
        dd.stats(first)
    dd.disable(second)
    assert first.config._attn_implementation == "eager"
    assert torch.equal(logits(first), stock)


def test_a_plan_given_to_the_inner_model_of_one_loaded_by_name() -> None:
    expected = logits(enabled())
    model = make_model("llama", "delta")
    dd.enable(model.model, small_config())
    assert torch.equal(logits(model), expected)
    assert dd.stats(model) is dd.stats(model.model)
    assert dd.stats(model).steps == STEPS - 1


def test_a_copied_layer_stays_with_its_model() -> None:
    model = enabled()
    expected = logits(model)
    for place in (1, 2):  # a Δ-layer and one of its sparse layers
        model.model.layers[place] = copy.deepcopy(model.model.layers[place])
    assert torch.equal(logits(model), expected)
    assert dd.stats(model).steps == 2 * (STEPS - 1)


def test_replicas_on_threads_as_data_parallel_makes_them() -> None:
    model = enabled()
    prompts = make_prompt(PROMPT, rows=2)
    with torch.no_grad():
        cache = [model(row[None]).past_key_values for row in prompts]
        twins = copy.deepcopy(cache)
        step = make_prompt(1)
        expected = [model(step, past_key_values=one).logits for one in twins]

        def replica(part: nn.Module) -> nn.Module:
            twin = part._replicate_for_data_parallel()
            for name, child in part._modules.items():
                if child is not None:
                    twin._modules[name] = replica(child)
                    twin.__dict__.pop(name, None)
            twin._parameters, twin._buffers = part._parameters, part._buffers
            return twin

        got: dict[int, torch.Tensor] = {}

        def run(place: int) -> None:
            with torch.no_grad():
                out = replica(model)(step, past_key_values=cache[place])
            got[place] = out.logits

        threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(got[place], expected[place]) for place in range(2))
    assert dd.stats(model).steps == 4


def test_a_bound_method_keeps_its_model() -> None:
    model = enabled()
    expected = model.generate(make_prompt(PROMPT), max_new_tokens=4, do_sample=False)
    kept, weak = model.generate, weakref.ref(model)
    assert "generate" not in vars(model)
    del model
    gc.collect()
    got = kept(make_prompt(PROMPT), max_new_tokens=4, do_sample=False)
    assert torch.equal(got, expected)
    del kept
    gc.collect()
    assert weak() is None


# Gradients


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_decode_step_that_needs_gradients_is_full_attention(family: str) -> None:
    gradients = []
    for delta in (False, True):
        model = make_model(family, stock_name(family)).double()
        if delta:
            dd.enable(model, small_config(family))
        with torch.no_grad():
            cache = model(make_prompt(40)).past_key_values
        model(make_prompt(1), past_key_values=cache).logits.sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert dd.stats(model).steps == 1
    assert dd.stats(model).attended_fraction == 1.0
    with torch.no_grad():
        model(make_prompt(1), past_key_values=cache)
    assert dd.stats(model).attended_fraction < 1.0


def test_gradients_of_soft_prompts_alone() -> None:
    model = enabled().requires_grad_(False)
    with torch.no_grad():
        cache = model(make_prompt(40)).past_key_values
    embeds = model.get_input_embeddings()(make_prompt(1)).requires_grad_()
    model(inputs_embeds=embeds, past_key_values=cache).logits.sum().backward()
    assert embeds.grad is not None
    assert dd.stats(model).attended_fraction == 1.0


def test_gradients_that_reach_a_soft_prompt_through_the_cache() -> None:
    gradients = []
    for delta in (False, True):
        model = make_model("llama", "sdpa").double().requires_grad_(False)
        if delta:
            dd.enable(model, small_config())
        prompt = model.get_input_embeddings()(make_prompt(40)).requires_grad_()
        cache = model(inputs_embeds=prompt).past_key_values
        model(make_prompt(1), past_key_values=cache).logits.sum().backward()
        gradients.append(prompt.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert (dd.stats(model).steps, dd.stats(model).attended_fraction) == (1, 1.0)


def test_gradients_from_a_static_cache() -> None:
    gradients = []
    for kind in (dd.DeltaCache, dd.DeltaStaticCache):
        model = enabled().double()
        cache = kind(model.config, **({} if kind is dd.DeltaCache else {"max_cache_len": 50}))
        with torch.no_grad():
            model(make_prompt(40), past_key_values=cache)
        model(make_prompt(1), past_key_values=cache).logits.sum().backward()
        assert (dd.stats(model).steps, dd.stats(model).attended_fraction) == (1, 1.0)
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


# Export and registration


def test_export_that_is_not_strict() -> None:
    model = enabled()

    class Prompt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(tokens, use_cache=False).logits

    with torch.no_grad():
        program = torch.export.export(Prompt(), (make_prompt(30),), strict=False)
        torch.testing.assert_close(program.module()(make_prompt(30)), model(make_prompt(30)).logits)
    assert dd.stats(model).steps == 0


SCRIPT = """
import importlib.util
import deltadecode
assert importlib.util.find_spec("transformers.modeling_utils") is not None
assert importlib.util.find_spec("transformers.modeling_utils") is not None
from transformers import AttentionInterface
import transformers.modeling_utils
assert "delta" in AttentionInterface()
"""


def test_a_look_at_the_module_before_its_import_does_not_stop_the_registration() -> None:
    environment = {"PYTHONPATH": str(Path(dd.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


# Errors


def test_what_a_user_can_meet_is_an_error_of_the_package() -> None:
    model = enabled()
    calls: list[Any] = [
        lambda: dd.enable(nn.Linear(2, 2)),
        lambda: dd.enable(model, {"page_size": 4}),
        lambda: dd.stats(make_model("llama", "sdpa")),
        lambda: generate(model, make_prompt(3), 4, output_attentions=True),
        lambda: generate(model, make_prompt(257), 1),
        lambda: model.generate(make_prompt(3), prompt_lookup_num_tokens=3),
        lambda: dd.DeltaStaticCache(model.config, max_cache_len=0),
        lambda: dd.DeltaStaticCache(model.config, max_cache_len=8, page_size=0),
    ]
    for call in calls:
        with pytest.raises(dd.DeltaDecodeError):
            call()


def test_one_embedding_behind_a_cache_is_a_decode_step() -> None:
    model = enabled().double()
    prompt = make_prompt(40)
    embeds = model.get_input_embeddings()(prompt).detach()
    whole = generate(model, None, 1, inputs_embeds=embeds)
    dd.stats(model).reset()
    part = generate(model, None, 1, inputs_embeds=embeds[:, :-1])
    rest = generate(model, None, 1, inputs_embeds=embeds, past_key_values=part.past_key_values)
    assert dd.stats(model).steps == 1
    assert not torch.allclose(rest.logits[0], whole.logits[0], atol=1e-3)
