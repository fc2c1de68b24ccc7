"""What becomes of recordings: other weights, copies, threads, and other attention for a while."""

import copy
import gc
import io
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from hf_pieces import SimulatedPiece
from hf_tiny import generate, make_model, make_prompt, small_config
from hf_twins import assert_same, forwards, make, plain, replays, run
from torch import nn

import deltadecode as dd
from deltadecode.engines.transformers import bind
from deltadecode.engines.transformers.layer_graphs import LayerForward
from deltadecode.engines.transformers.swap import enabled, stock_attention

STEPS = 8


@pytest.mark.parametrize("change", ["data", "load", "module", "half"])
def test_other_weights(change: str, pieces: list[SimulatedPiece]) -> None:
    model = make()
    pair = model, plain(model)
    assert_same(pair, make_prompt(41), STEPS)
    other, older = make_model("llama", "sdpa", seed=1), []
    for each in pair:
        if change == "data":
            for mine, its in zip(each.parameters(), other.parameters(), strict=True):
                mine.data = its.data.clone()
        elif change == "load":
            each.load_state_dict(other.state_dict())
        elif change == "module":
            for mine, its in zip(each.model.layers, other.model.layers, strict=True):
                older.append(mine.mlp)  # as an adapter around it would hold it
                mine.mlp = copy.deepcopy(its.mlp)
        else:
            each.bfloat16()
    made = len(pieces)
    assert_same(pair, make_prompt(41), STEPS)
    assert len(pieces) == made + (0 if change == "load" else 12)


def test_disable_and_enable_again(pieces: list[SimulatedPiece]) -> None:
    model = make_model("llama", "sdpa")
    before = [set(vars(layer)) for layer in model.model.layers]
    for _ in range(2):
        dd.enable(model, small_config(), layer_graphs=True)
        assert all(isinstance(forward, LayerForward) for forward in forwards(model))
        generate(model, make_prompt(41), STEPS)
    assert len(pieces) == 24
    dd.enable(model, small_config())
    assert forwards(model) == [None] * 6
    dd.enable(model, small_config(), layer_graphs=True)
    dd.disable(model)
    assert [set(vars(layer)) for layer in model.model.layers] == before
    generate(model, make_prompt(41), STEPS)
    assert len(pieces) == 24


def test_another_attention_for_a_while(pieces: list[SimulatedPiece]) -> None:
    model = make()
    pair = model, plain(model)
    assert_same(pair, make_prompt(41), STEPS)
    cfg = small_config(budget_pages=4)
    for each in pair:
        with stock_attention(each):
            generate(each, make_prompt(41), STEPS)
        with enabled(each, cfg):
            generate(each, make_prompt(41), STEPS)
    made = len(pieces)
    assert made == 12
    assert_same(pair, make_prompt(41), STEPS)
    assert replays(pieces[-12:]) == {STEPS - 3}


def _pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
def test_copies_have_recordings_of_their_own(copied: Any, pieces: list[SimulatedPiece]) -> None:
    model = make()
    expected = run(model, make_prompt(41), STEPS)
    twin = copied(model)
    for mine, its in zip(forwards(model), forwards(twin), strict=True):
        assert its is not mine and its.recordings == {} and its.last == mine.last
    with torch.no_grad():
        for parameter in twin.model.layers.parameters():
            parameter.mul_(1.5)
    other = run(twin, make_prompt(41), STEPS)
    assert not torch.equal(other[1], expected[1])
    assert_same((twin, plain(twin)), make_prompt(41), STEPS)
    again = run(model, make_prompt(41), STEPS)
    assert all(map(torch.equal, again[:2], expected[:2]))
    assert len(pieces) == 24


def test_a_layer_that_is_copied_alone(pieces: list[SimulatedPiece]) -> None:
    model = make()
    twin = plain(model)
    model.model.layers[2] = copy.deepcopy(model.model.layers[2])
    assert_same((model, twin), make_prompt(41), STEPS)
    assert len(pieces) == 12
    older = model.model.layers[2]  # it may be put back
    model.model.layers[2] = copy.deepcopy(older)
    assert_same((model, twin), make_prompt(41), STEPS)
    assert len(pieces) == 24
    assert pickle.loads(pickle.dumps(model.model.layers[2])) is not None


def test_a_model_is_freed_as_promptly_as_without(pieces: list[SimulatedPiece]) -> None:
    gc.collect()
    gc.disable()
    try:
        freed = []
        for graphs in (False, True):
            model = make_model("llama", "sdpa")
            dd.enable(model, small_config(), layer_graphs=graphs)
            state = weakref.ref(bind.find_state(model))
            generate(model, make_prompt(3), STEPS)
            weak = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
            pieces.clear()
            del model
            freed.append((weak() is None, state() is None))
        assert freed[1] == freed[0] == (True, True)
    finally:
        gc.enable()


def test_threads(pieces: list[SimulatedPiece]) -> None:
    model = make()
    prompts = [make_prompt(41, seed=seed) for seed in range(3)]
    twin = plain(model)
    expected = [generate(twin, prompt, 30) for prompt in prompts]
    got: dict[int, Any] = {}

    def decode(place: int) -> None:
        got[place] = generate(model, prompts[place], 30)

    threads = [threading.Thread(target=decode, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, out in enumerate(expected):
        assert torch.equal(got[place].sequences, out.sequences)
        assert torch.equal(torch.stack(got[place].logits), torch.stack(out.logits))
    assert len(pieces) == 12


def test_one_thread_after_another(pieces: list[SimulatedPiece]) -> None:
    model = make()
    run(model, make_prompt(41), STEPS)
    thread = threading.Thread(target=run, args=(model, make_prompt(41), STEPS))
    thread.start()
    thread.join()
    run(model, make_prompt(41), STEPS)
    assert len(pieces) == 12
    assert replays(pieces) == {3 * (STEPS - 1) - 2}


def test_another_thread_meanwhile_runs_layers_as_they_are(pieces: list[SimulatedPiece]) -> None:
    model = make()
    twin = plain(model)
    prompt = make_prompt(41, seed=3)
    expected = generate(twin, prompt, STEPS)
    inner: list[Any] = []

    def meanwhile(module: Any, args: Any) -> None:
        if args[0].shape[1] == 1 and not inner:
            inner.append(None)
            thread = threading.Thread(
                target=lambda: inner.append(generate(model, prompt, STEPS)), daemon=True
            )
            thread.start()
            thread.join()

    handle = model.model.layers[3].register_forward_pre_hook(meanwhile)
    got, outer = generate(model, make_prompt(41), 20), generate(twin, make_prompt(41), 20)
    handle.remove()
    assert torch.equal(torch.stack(got.logits), torch.stack(outer.logits))
    assert torch.equal(torch.stack(inner[1].logits), torch.stack(expected.logits))
    assert replays(pieces) == {19 - 2}


def test_replicas_run_their_own_layers(pieces: list[SimulatedPiece]) -> None:
    model = make()
    run(model, make_prompt(41), STEPS)

    def replica(part: nn.Module) -> Any:
        twin = part._replicate_for_data_parallel()
        for name, child in part._modules.items():
            if child is not None:
                twin._modules[name] = replica(child)
        for name, parameter in part._parameters.items():
            setattr(twin, name, None if parameter is None else parameter.detach() * 2)
        return twin

    twin = replica(model)
    expected = plain(model)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(2)
        logits = []
        for each in (twin, expected):
            cache = dd.DeltaCache(model.config)
            each(make_prompt(41), past_key_values=cache)
            logits.append([each(make_prompt(1), past_key_values=cache).logits for _ in range(4)])
    assert all(map(torch.equal, *logits))
    assert all(isinstance(forward, LayerForward) for forward in forwards(model))


def test_compiled_models_run_as_they_are(pieces: list[SimulatedPiece]) -> None:
    model = make()
    twin = plain(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        logits = []
        for each in (compiled, twin):
            cache = dd.DeltaCache(model.config)
            each(make_prompt(41), past_key_values=cache)
            logits.append([each(make_prompt(1), past_key_values=cache).logits for _ in range(4)])
    torch.testing.assert_close(*logits)
