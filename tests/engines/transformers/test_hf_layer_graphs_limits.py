"""When layers run as they are, though layer graphs are asked for."""

import functools
import warnings
from typing import Any

import pytest
import torch
from hf_pieces import SimulatedPiece
from hf_tiny import make_model, make_prompt, small_config, stock_name
from hf_twins import assert_same, cache_of, forwards, make, plain, replays, run
from torch import nn
from transformers.models.llama import modeling_llama

import deltadecode as dd
from deltadecode.engines.transformers import bind

STEPS = 8


def put(layer: Any, attention: Any = None, mlp: Any = None) -> None:
    """Replace what the parts of a layer compute; each gets the module's own forward first."""
    for part, function in ((layer.self_attn, attention), (layer.mlp, mlp)):
        if function is not None:
            part.forward = functools.partial(function, type(part).forward, part)


def attends(change: Any) -> Any:
    """A Llama attention whose query, key and value are changed behind the cache."""

    def forward(own: Any, part: Any, hidden_states: Any, **kwargs: Any) -> Any:
        stock = modeling_llama.ALL_ATTENTION_FUNCTIONS

        class Interface:
            @staticmethod
            def get_interface(*names: Any) -> Any:
                function = stock.get_interface(*names)
                return lambda module, *states, **options: function(
                    module, *change(*states), **options
                )

        modeling_llama.ALL_ATTENTION_FUNCTIONS = Interface
        try:
            return own(part, hidden_states, **kwargs)
        finally:
            modeling_llama.ALL_ATTENTION_FUNCTIONS = stock

    return forward


REFUSED = {
    "an operation between": (
        {"attention": attends(lambda q, k, v, m: (q * 1.5, k, v, m))},
        "computes mul between its cache and its attention",
    ),
    "keys of its own": (
        {
            "attention": lambda own, part, hidden_states, **given: own(
                part, hidden_states, **{**given, "past_key_values": None}
            )
        },
        "attends to keys that it does not store",
    ),
    "other keys": (
        {"attention": attends(lambda q, k, v, m: (q, v, v, m))},
        "attends to other keys than its cache gives",
    ),
    "a mask of its own": (
        {"attention": attends(lambda q, k, v, m: (q, k, v, KEPT_MASK if k.shape[2] == 43 else m))},
        "attends with a mask of its own",
    ),
    "a value that the host reads": (
        {"mlp": lambda own, part, x: own(part, x) if float(x.sum()) else x},
        "waits for the GPU in _local_scalar_dense",
    ),
    "a length that the host reads": (
        {"mlp": lambda own, part, x: own(part, x) + len(x.nonzero())},
        "waits for the GPU in nonzero",
    ),
    "another tensor": (
        {"mlp": lambda own, part, x: own(part, x) + KEPT},
        "reads in add what it was not given as a token's tensor",
    ),
    "another device": (
        {"mlp": lambda own, part, x: own(part, x) + torch.ones(1, device="meta").shape[0]},
        "computes ones on another device",
    ),
    "weights that change": (
        {"mlp": lambda own, part, x: own(part, x) + part.up_proj.weight.mul_(1.0)[0, 0]},
        "writes in mul_ to what it was given",
    ),
    "an error of the capture": (
        {"mlp": lambda own, part, x: own(part, x) if recorded_alone() else x},
        "cannot be recorded (no capture)",
    ),
}  # fmt: skip
KEPT = torch.full((1,), 0.5)
KEPT_MASK = torch.ones(1, 1, 1, 43, dtype=torch.bool)  # of the step that is recorded


def recorded_alone() -> bool:
    """Fails as an operation does in a capture, and else is True."""
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    if any(isinstance(mode, SimulatedPiece) for mode in modes):
        raise RuntimeError("no capture\nof this")
    return True


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_cannot_be_recorded(case: str, pieces: list[SimulatedPiece]) -> None:
    changed, reason = REFUSED[case]
    model = make()
    pair = model, plain(model)
    for each in pair:
        for layer in (1, 2):
            put(each.model.layers[layer], **changed)
    kept: list[Any] = []
    model.model.layers[2].register_forward_hook(
        lambda module, args, out: kept.append((out, out.clone()))
    )
    with pytest.warns(UserWarning) as seen:
        assert_same(pair, make_prompt(41), 21)
    # What such a layer returns belongs to nobody.
    assert len(kept) == 21 and all(torch.equal(*both) for both in kept)
    (warning,) = seen
    assert str(warning.message) == (
        f"LlamaDecoderLayer {reason}: it decodes without layer graphs, and so may others of this "
        "model"
    )
    assert [forward.refused for forward in forwards(model)] == [False, True, True] + [False] * 3
    # What was recorded of them ran once at most.
    assert {20 - 2} < replays(pieces) <= {-1, 0, 20 - 2}


@pytest.mark.parametrize("kind", ["default", "offloaded"])
def test_experts_that_the_host_sends_tokens_to(kind: str, pieces: list[SimulatedPiece]) -> None:
    model = make("gpt_oss", experts="eager", recent_pages=0)
    pair = model, plain(model)
    caches = [cache_of(each, kind) for each in pair]
    # By then every layer has stored its token and attended.
    with pytest.warns(UserWarning, match="GptOssDecoderLayer waits for the GPU in"):
        assert_same(pair, make_prompt(41, 2), 20, caches=caches)
    assert all(forward.refused for forward in forwards(model))


def test_layers_of_another_kind(pieces: list[SimulatedPiece]) -> None:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=61, vocab_size_per_layer_input=61, hidden_size=32, intermediate_size=48,
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        hidden_size_per_layer_input=8, num_kv_shared_layers=2, laurel_rank=4, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"] * 3, sliding_window=12,
        activation_sparsity_pattern=[0.0] * 6, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3nForCausalLM(config).eval()
    cfg = small_config(dense_layers=(), delta_layers=(1,))
    dd.enable(model, cfg, layer_graphs=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert_same((model, plain(model)), make_prompt(41), 20)
    (message,) = {str(each.message) for each in seen if "layer graphs" in str(each.message)}
    assert message.startswith("Gemma3nTextDecoderLayer gets hidden states of shape [4, 1, 1, 32]")
    assert pieces == []


def test_a_layer_that_gets_one_tensor_twice(pieces: list[SimulatedPiece]) -> None:
    model = make()
    pair = model, plain(model)
    for each in pair:
        steps = iter(range(100))

        def doubled(module: Any, args: Any, given: Any, steps: Any = steps) -> Any:
            cos, sin = given["position_embeddings"]
            both = (cos, cos) if next(steps) < 5 else (cos, sin)
            return args, {**given, "position_embeddings": both}

        each.model.layers[3].register_forward_pre_hook(doubled, with_kwargs=True)
    with pytest.warns(UserWarning, match="LlamaDecoderLayer gets one tensor twice: it decodes"):
        assert_same(pair, make_prompt(41), 20)


@pytest.mark.parametrize("where", ["update", "attention"])
def test_errors_of_cache_and_attention_are_raised(
    where: str, pieces: list[SimulatedPiece], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    cache = dd.DeltaCache(model.config)
    with torch.no_grad():
        model(make_prompt(41), past_key_values=cache)
        model(make_prompt(1), past_key_values=cache)
        with monkeypatch.context() as patch:
            if where == "update":
                patch.setattr(cache.layers[2], "update", lambda *given: 1 / 0)
            else:
                kernels = bind.find_state(model).kernels
                patch.setattr(kernels, "attend", lambda *given, **options: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(make_prompt(1), past_key_values=cache)
    assert "update" not in vars(cache)
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert not any(forward.refused for forward in forwards(model))
    assert_same((model, plain(model)), make_prompt(41), 20)


def test_a_step_that_breaks_off_between_layers(pieces: list[SimulatedPiece]) -> None:
    model = make()
    twin = plain(model)

    def broken(module: Any, args: Any) -> None:
        if args[0].shape[1] == 1:
            raise ZeroDivisionError

    handle = model.model.layers[3].register_forward_pre_hook(broken)
    with pytest.raises(ZeroDivisionError):
        run(model, make_prompt(41), STEPS)
    handle.remove()
    assert_same((model, twin), make_prompt(41), 20)


def test_an_interrupt_ends_the_capture(pieces: list[SimulatedPiece]) -> None:
    model = make()

    def interrupted(own: Any, part: Any, x: Any) -> Any:
        if torch.utils._python_dispatch._get_current_dispatch_mode_stack():
            raise KeyboardInterrupt
        return own(part, x)

    put(model.model.layers[3], mlp=interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, make_prompt(41), STEPS)
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    del model.model.layers[3].mlp.forward
    assert_same((model, plain(model)), make_prompt(41), 20)


def test_a_hook_within_a_layer_runs_at_every_step(pieces: list[SimulatedPiece]) -> None:
    model = make()
    twin = plain(model)
    run(model, make_prompt(41), STEPS)
    seen: list[Any] = []
    mlp = model.model.layers[2].mlp
    handle = mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    assert_same((model, twin), make_prompt(41), STEPS)
    handle.remove()
    assert seen == [41] + [1] * (STEPS - 1)
    assert_same((model, twin), make_prompt(41), STEPS)
    assert replays(pieces) == {2 * (STEPS - 1) - 2}


def test_passes_that_are_no_steps_without_gradients(pieces: list[SimulatedPiece]) -> None:
    model = make()

    def step(**options: Any) -> None:
        cache = dd.DeltaCache(model.config)
        with torch.no_grad():
            model(make_prompt(41), past_key_values=cache)
        for _ in range(3):
            model(make_prompt(1), past_key_values=cache, **options)

    step()  # gradients
    model.requires_grad_(False)
    step()  # none, but what others compute from its output may need some
    with torch.no_grad():
        model.train()
        step()
        model.eval()
        with torch.autocast("cpu"):
            step()
        for _ in range(3):
            model(make_prompt(1))  # a prompt of one token
        run(model, make_prompt(41), 9, cache_implementation="static", disable_compile=True)
    assert pieces == []
    with torch.no_grad():
        step()
    assert len(pieces) == 12


def test_nothing_is_recorded_on_a_cpu() -> None:
    model = make()
    assert_same((model, plain(model)), make_prompt(41), 20)
    assert all(forward.recordings == {} for forward in forwards(model))


class Packed(nn.Parameter):
    """Weights as quantised ones are, of another type."""


@pytest.mark.parametrize("case", ["two devices", "adapters", "hooks of accelerate", "packed"])
def test_models_that_are_not_recorded(case: str, pieces: list[SimulatedPiece]) -> None:
    model = make()
    part = model.model.layers[3].mlp.up_proj
    if case == "two devices":
        part.register_buffer("elsewhere", torch.empty(1, device="meta"))
    elif case == "adapters":  # as PEFT has them
        part.base_layer = nn.Identity().eval()
    elif case == "packed":
        part.weight = Packed(part.weight.detach())
    else:
        part._hf_hook = object()
    run(model, make_prompt(41), STEPS)
    assert pieces == []
    model.model.layers[3].mlp = model.model.layers[2].mlp
    run(model, make_prompt(41), STEPS)
    assert len(pieces) == 12


def test_what_enable_refuses() -> None:
    model = make_model("llama", stock_name("llama"))
    with pytest.raises(dd.ArgumentError, match="got lossless=True") as error:
        dd.enable(model, lossless=True, layer_graphs=True)
    assert "\n" not in str(error.value)
    with pytest.raises(dd.ArgumentError, match="layer_graphs must be True or False, got 'yes'"):
        dd.enable(model, layer_graphs="yes")  # type: ignore[arg-type]
    assert forwards(model) == [None] * 6
