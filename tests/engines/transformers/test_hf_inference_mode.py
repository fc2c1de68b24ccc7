"""A cache may be filled in inference mode and continued outside of it, and the other way round."""

import copy
import itertools
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from hf_pieces import SimulatedPiece
from hf_tiny import generate, make_model, make_prompt, small_config, stock_name
from hf_twins import cache_of, make, padded

import deltadecode as dd

INFERENCE, NO_GRAD = torch.inference_mode, torch.no_grad
by_cache = pytest.mark.parametrize("kind", ["default", "offloaded"])
by_type = pytest.mark.parametrize("kv_dtype", [None, "int8"])
by_modes = pytest.mark.parametrize(
    "modes",
    [
        [INFERENCE, *[NO_GRAD] * 99],
        [NO_GRAD, *[INFERENCE] * 99],
        [INFERENCE, INFERENCE, *[NO_GRAD] * 99],
        [INFERENCE, NO_GRAD] * 50,
    ],
    ids=["prompt", "steps", "prompt and step", "in turns"],
)


def enabled(family: str = "llama", **changes: Any) -> Any:
    model = make_model(family, stock_name(family))
    dd.enable(model, small_config(family, **changes))
    return model


def run(model: Any, cache: Any, modes: Any, passes: Any, rows: Any) -> Any:
    """Logits of passes of so many tokens, each in its mode, and the counts.

    A number below 0 takes tokens back, "copy" goes on with a copy, and "reorder" swaps rows.
    """
    dd.stats(model).reset()
    tokens, mask = rows
    found = []
    for place, (count, mode) in enumerate(zip(["prompt", *passes], modes, strict=False)):
        with mode():
            if count == "copy":
                cache = copy.deepcopy(cache) if place % 2 else pickle.loads(pickle.dumps(cache))
            elif count == "reorder":
                cache.reorder_cache(torch.arange(len(mask)).flip(0))
                mask = mask.flip(0)
            elif count != "prompt" and count < 0:
                cache.crop(count)
                mask = mask[:, :count]
            else:
                if count != "prompt":
                    tokens = make_prompt(count, len(mask), seed=place)
                    mask = torch.cat([mask, mask.new_ones(tokens.shape)], dim=1)
                out = model(input_ids=tokens, attention_mask=mask, past_key_values=cache)
                found.append(out.logits[:, -1])
    return torch.stack(found), dd.stats(model).per_layer


def check(model: Any, make_cache: Any, modes: Any, passes: Any, rows: Any) -> None:
    expected = run(model, make_cache(), itertools.repeat(NO_GRAD), passes, rows)
    assert dd.stats(model).attended_fraction < 1
    found = run(model, make_cache(), modes, passes, rows)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]


@by_modes
@by_type
@by_cache
@pytest.mark.parametrize("tokens", [14, 41])
def test_prompt_and_steps(tokens: int, kind: str, kv_dtype: str | None, modes: Any) -> None:
    model = enabled()
    caches = partial(cache_of, model, kind, kv_dtype)
    check(model, caches, modes, [1] * 12 + [3, 1, 1], padded((tokens,)))


@by_modes
@by_type
@by_cache
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_groups_of_rows(family: str, kind: str, kv_dtype: str | None, modes: Any) -> None:
    model = enabled(family, budget_share=0.4)
    caches = partial(cache_of, model, kind, kv_dtype)
    check(model, caches, modes, [1] * 6 + [3] + [1] * 4, padded((31, 9, 26)))


@by_modes
@by_type
@by_cache
def test_tokens_are_taken_back(kind: str, kv_dtype: str | None, modes: Any) -> None:
    model = enabled()
    caches = partial(cache_of, model, kind, kv_dtype)
    # To a length beyond the budget, then to one within it, and beyond again.
    passes = [1, 1, -4, 1, 1, -19, *[1] * 12]
    check(model, caches, modes, passes, padded((31, 9, 26)))


@by_modes
@by_type
@by_cache
def test_copies_and_other_rows(kind: str, kv_dtype: str | None, modes: Any) -> None:
    model = enabled()
    caches = partial(cache_of, model, kind, kv_dtype)
    passes = [1, "copy", 1, "copy", 1, 1, "copy", 1, "reorder", 1, "reorder", 1, 1, "reorder", 1]
    check(model, caches, modes, passes, padded((31, 9, 26)))


@by_modes
@by_cache
def test_layer_graphs(kind: str, modes: Any, pieces: list[SimulatedPiece]) -> None:
    model = make()
    passes, rows = [1] * 10, padded((31, 9, 26))
    check(model, partial(cache_of, model, kind), modes, passes, rows)
    assert any(piece.replays > 1 for piece in pieces)


@by_cache
def test_generate_continues(kind: str) -> None:
    model, prompt = enabled(), make_prompt(41)
    found = []
    for mode in (NO_GRAD, INFERENCE):
        cache = cache_of(model, kind)
        with mode():
            first = generate(model, prompt, 6, past_key_values=cache).sequences
        found.append(torch.stack(generate(model, first, 8, past_key_values=cache).logits))
    assert torch.equal(*found)
