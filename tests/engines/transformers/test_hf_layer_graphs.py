"""Layer graphs give what layers give that run as they are, bit for bit.

Pieces are simulated on the CPU: what is recorded holds NaN until it is replayed.
"""

import itertools
from typing import Any

import pytest
import torch
from hf_pieces import SimulatedPiece
from hf_tiny import FAMILIES, make_prompt
from hf_twins import assert_same, cache_of, make, padded, plain, replays, run

import deltadecode as dd
from deltadecode.engines.transformers.layer_graphs import LayerForward

SHARE = {"budget_share": 0.4}
NO_RECENT = {"recent_pages": 0}
# Of each layer's calls, the first is run as it is and the second is recorded.
BEFORE_REPLAYS = 2


@pytest.mark.parametrize("kind", ["default", "offloaded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, kind: str, pieces: list[SimulatedPiece]) -> None:
    model = make(family)
    pair = model, plain(model)
    assert_same(pair, make_prompt(41, 2), 30, caches=[cache_of(each, kind) for each in pair])
    assert len(pieces) == 2 * 6
    assert replays(pieces) == {29 - BEFORE_REPLAYS}
    assert dd.stats(model).attended_fraction < 0.9


def test_layers_are_told_apart_by_their_numbers(pieces: list[SimulatedPiece]) -> None:
    model = make()
    run(model, make_prompt(41), 8)
    # Of every layer one piece makes queries and keys, and the other one the hidden state.
    matrices = [
        sum(func is torch.ops.aten.mm.default for func, *_ in piece.operations) for piece in pieces
    ]
    assert matrices == [3, 4] * 6


def test_tensors_of_the_token_are_copied_once_for_all_layers(pieces: list[SimulatedPiece]) -> None:
    model = make()
    run(model, make_prompt(41), 8)
    recordings = [
        recording
        for layer in model.model.layers
        for recording in vars(layer)["forward"].recordings.values()
    ]
    inputs = {id(tensor) for recording in recordings for tensor in recording.inputs[1:]}
    assert len(recordings) == 6
    assert len(inputs) == len(recordings[0].inputs) - 1
    for before, behind in itertools.pairwise(recordings):
        assert behind.inputs[0] is before.result


def test_a_layer_that_gets_a_tensor_of_its_own_later(pieces: list[SimulatedPiece]) -> None:
    model = make()
    pair = model, plain(model)
    for each in pair:
        steps = iter(range(100))

        def turned(module: Any, args: Any, given: Any, steps: Any = steps) -> Any:
            cos, sin = given["position_embeddings"]
            later = next(steps) > 6
            return args, {**given, "position_embeddings": (cos + 0.5, sin) if later else (cos, sin)}

        each.model.layers[3].register_forward_pre_hook(turned, with_kwargs=True)
    assert_same(pair, make_prompt(41), 20)
    assert replays(pieces) == {19 - BEFORE_REPLAYS}


@pytest.mark.parametrize("changes", [{}, SHARE, NO_RECENT])
@pytest.mark.parametrize("kind", ["default", "offloaded"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_padded_batches(
    family: str, kind: str, changes: dict[str, Any], pieces: list[SimulatedPiece]
) -> None:
    model = make(family, **changes)
    pair = model, plain(model)
    tokens, mask = padded((41, 9, 26, 41, 3))
    caches = [cache_of(each, kind) for each in pair]
    assert_same(pair, tokens, 30, caches=caches, attention_mask=mask)
    assert replays(pieces) == {29 - BEFORE_REPLAYS}


@pytest.mark.parametrize("kind", ["default", "offloaded"])
@pytest.mark.parametrize("tokens", [1, 3, 19])
def test_from_within_the_budget_to_beyond(
    tokens: int, kind: str, pieces: list[SimulatedPiece]
) -> None:
    model = make("qwen3")
    pair = model, plain(model)
    assert_same(pair, make_prompt(tokens, 2), 40, caches=[cache_of(each, kind) for each in pair])
    assert replays(pieces) == {39 - BEFORE_REPLAYS}


@pytest.mark.parametrize("kind", ["default", "offloaded"])
def test_eight_bits(kind: str, pieces: list[SimulatedPiece]) -> None:
    model = make("qwen3")
    pair = model, plain(model)
    caches = [cache_of(each, kind, "int8") for each in pair]
    tokens, mask = padded((41, 9, 41))
    assert_same(pair, tokens, 30, caches=caches, attention_mask=mask)
    assert replays(pieces) == {29 - BEFORE_REPLAYS}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype, pieces: list[SimulatedPiece]) -> None:
    model = make("qwen3").to(dtype)
    assert_same((model, plain(model)), make_prompt(41, 2), 30)
    assert replays(pieces) == {29 - BEFORE_REPLAYS}


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.3},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
        {"prefill_chunk_size": 10},
        {"prefill_chunk_size": 40},  # the last chunk is one token, and no step
    ],
)
def test_ways_to_generate(options: dict[str, Any], pieces: list[SimulatedPiece]) -> None:
    model = make()
    assert_same((model, plain(model)), make_prompt(41, 2), 20, **options)
    assert len(pieces) == 12
    assert replays(pieces) == {19 - BEFORE_REPLAYS}


@pytest.mark.parametrize("kind", ["default", "offloaded"])
def test_a_conversation_that_is_cropped_and_goes_on(
    kind: str, pieces: list[SimulatedPiece]
) -> None:
    model = make()
    pair = model, plain(model)
    caches = [cache_of(each, kind) for each in pair]
    tokens = assert_same(pair, make_prompt(41, 2), 31, caches=caches)
    for cache in caches:
        cache.crop(-11)
    tokens = torch.cat([tokens[:, :-12], make_prompt(2, 2, seed=5)], dim=1)
    for steps in (20, 9):  # the second begins with one token, as decoding would have gone on
        mask = torch.ones_like(tokens)
        tokens = assert_same(pair, tokens, steps, caches=caches, attention_mask=mask)
    assert len(pieces) == 12
    assert replays(pieces) == {30 + 19 + 9 - BEFORE_REPLAYS}


def test_caches_and_masks_of_other_calls_leave_nothing(pieces: list[SimulatedPiece]) -> None:
    model = make()
    pair = model, plain(model)
    for lengths in ((41, 9), (12, 33), (41, 41), (50, 2)):
        tokens, mask = padded(lengths)
        assert_same(pair, tokens, 12, attention_mask=mask)
    # Without padding there is no mask: that is another recording.
    assert len(pieces) == 24


def test_two_caches_in_turns(pieces: list[SimulatedPiece]) -> None:
    model = make()
    pair = model, plain(model)
    prompts = [make_prompt(41, 2, seed=seed) for seed in range(2)]
    found = []
    for each in pair:
        caches = [dd.DeltaCache(each.config) for _ in prompts]
        logits = []
        with torch.no_grad():
            last = [
                each(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
                for prompt, cache in zip(prompts, caches, strict=True)
            ]
            for _ in range(12):
                for place, cache in enumerate(caches):
                    logits.append(each(last[place], past_key_values=cache).logits)
                    last[place] = logits[-1].argmax(-1)
        found.append(torch.stack(logits))
    assert torch.equal(*found)
    assert replays(pieces) == {24 - BEFORE_REPLAYS}


def test_batches_have_recordings_of_their_own_up_to_a_number(
    pieces: list[SimulatedPiece],
) -> None:
    model = make()
    pair = model, plain(model)
    for rows in range(1, 11):
        assert_same(pair, make_prompt(30, rows), 6)
    assert_same(pair, make_prompt(30, 3), 6)
    forwards = [vars(layer)["forward"] for layer in model.model.layers]
    assert all(isinstance(forward, LayerForward) for forward in forwards)
    assert [len(forward.recordings) for forward in forwards] == [8] * 6
    assert len(pieces) == 8 * 12


def test_inference_mode_and_no_grad_have_recordings_of_their_own(
    pieces: list[SimulatedPiece],
) -> None:
    model = make()
    pair = model, plain(model)
    found = []
    for each in pair:
        logits = []
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
            with mode():
                cache = dd.DeltaCache(each.config)
                each(make_prompt(41), past_key_values=cache)
                logits += [each(make_prompt(1), past_key_values=cache).logits for _ in range(6)]
        found.append(torch.stack(logits))
    assert torch.equal(*found)
    assert len(pieces) == 24


def test_embeddings_in_the_place_of_tokens(pieces: list[SimulatedPiece]) -> None:
    model = make()
    found = []
    for each in (model, plain(model)):
        cache, logits = dd.DeltaCache(each.config), []
        with torch.no_grad():
            embeds = each.model.embed_tokens(make_prompt(41, 2))
            each(inputs_embeds=embeds, past_key_values=cache)
            for step in range(8):
                one = embeds[:, step : step + 1]
                logits.append(each(inputs_embeds=one, past_key_values=cache).logits)
        found.append(torch.stack(logits))
    assert torch.equal(*found)
    assert replays(pieces) == {8 - BEFORE_REPLAYS}


def test_what_leaves_the_model_is_not_overwritten(pieces: list[SimulatedPiece]) -> None:
    model = make()
    model.model.norm = torch.nn.Identity()
    cache, states = dd.DeltaCache(model.config), []
    with torch.no_grad():
        model(make_prompt(41), past_key_values=cache)
        for step in range(8):
            out = model.model(make_prompt(1, seed=step), past_key_values=cache)
            states.append((out.last_hidden_state, out.last_hidden_state.clone()))
    assert all(torch.equal(*pair) for pair in states)
    assert replays(pieces) == {8 - BEFORE_REPLAYS}


def test_hidden_states_that_are_asked_for(pieces: list[SimulatedPiece]) -> None:
    model = make()
    found = []
    for each in (model, plain(model)):
        run(each, make_prompt(41), 9)
        out = each.generate(
            make_prompt(41), max_new_tokens=9, do_sample=False, return_dict_in_generate=True,
            output_hidden_states=True,
        )  # fmt: skip
        found.append([layer for step in out.hidden_states for layer in step])
        # Their hooks stay on the layers.
        run(each, make_prompt(41), 9)
    assert all(map(torch.equal, *found))
    assert replays(pieces) == {8 - BEFORE_REPLAYS + 8}
