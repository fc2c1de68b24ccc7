"""Rounding to eight bits in the memory benchmark, against every number that there is."""

import json
from functools import partial

import pytest
import torch
from transformers import DynamicCache

from benchmarks.command import launch
from benchmarks.memory.__main__ import memory
from benchmarks.memory.rounding import (
    ROUNDINGS,
    RoundedCache,
    Rounding,
    round_float8,
    round_int8,
    round_prompt,
    round_token,
    scale_of,
)


def e4m3():
    """All finite numbers: sign, four bits of exponent (bias 7), three of mantissa."""
    found = []
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) == (15, 7):
                continue  # NaN
            whole = mantissa / 8 + (exponent > 0)
            found.append(whole * 2.0 ** (max(exponent, 1) - 7))
    return torch.tensor([*(-one for one in found), *found], dtype=torch.float64)


def test_a_number_becomes_the_nearest_one():
    states = torch.randn(2, 50, 8, dtype=torch.float64) * torch.logspace(-4, 3, 8)
    scale = torch.tensor([0.25, 2.0])[:, None, None]
    numbers = e4m3() * scale[..., None]
    rounded = round_float8(states.float(), scale).double()
    off = (states.float().double()[..., None] - numbers).abs()
    assert torch.equal((states.float().double() - rounded).abs(), off.amin(dim=-1))
    assert rounded[0].abs().max() == 448 * 0.25  # what is larger becomes the largest


def test_scales_leave_room_and_protected_pages_stay():
    states = torch.randn(3, 40, 8) * torch.tensor([1e-3, 1.0, 1e4])[:, None, None]
    half = states.bfloat16().float()
    scale = scale_of(states)
    assert torch.equal(scale.log2(), scale.log2().round())
    most = states.abs().amax(dim=(1, 2), keepdim=True) / scale
    assert ((most > 448 / 4) & (most <= 448 / 2)).all()
    for rounding in ROUNDINGS:
        rounded, _ = round_prompt(states, rounding, page_size=16)
        kept = 40 if rounding.number == "bfloat16" else 16 * rounding.protected
        assert torch.equal(rounded[:, :kept], half[:, :kept])
        assert kept == 40 or not torch.equal(rounded[:, kept:], half[:, kept:])
    by_page, _ = round_prompt(states, Rounding("float8", "page"), page_size=16)
    assert torch.equal(by_page[:, 16:32], round_float8(half[:, 16:32], scale_of(half[:, 16:32])))


def test_each_row_is_rounded_in_its_own_way(tiny_shape):
    prompt = DynamicCache(config=tiny_shape)
    for layer in range(tiny_shape.num_hidden_layers):
        prompt.update(*torch.randn(2, 1, 2, 40, 16), layer)
    cache = RoundedCache(tiny_shape, prompt, ROUNDINGS, page_size=16)
    new = torch.randn(2, 1, 2, 1, 16).expand(-1, len(ROUNDINGS), -1, -1, -1)
    keys, values = cache.update(*new, 3)
    for row, rounding in enumerate(ROUNDINGS):
        for states, side, one in zip((keys, values), ("keys", "values"), new, strict=True):
            stored = getattr(prompt.layers[3], side)[0]
            mine = rounding.of_side(side)
            rounded, frame = round_prompt(stored, mine, page_size=16)
            token = round_token(one[row], mine, frame)
            assert torch.equal(states[row], torch.cat([rounded, token], dim=1))
            whole = row == 0 or rounding.of not in ("both", side)
            assert whole == torch.equal(token, one[row].bfloat16().float())


def test_keys_less_their_mean_lose_less_where_all_have_much_in_common():
    states = (torch.randn(3, 40, 8) + 100 * torch.randn(3, 1, 8)).bfloat16().float()
    plain, centred = Rounding("float8", "head"), Rounding("float8", "head", centred=True)
    lost = [
        (round_prompt(states, one, page_size=16)[0] - states).abs().mean()
        for one in (plain, centred, centred.of_side("values"))
    ]
    assert 10 * lost[1] < lost[0] == lost[2]


def test_int8_has_127_steps_to_either_side_of_each_token():
    states = torch.randn(3, 5, 8) * torch.logspace(-3, 3, 5)[:, None]
    step = states.abs().amax(dim=-1, keepdim=True) / 127
    steps = torch.arange(-127, 128) * step[..., None]
    off = (states[..., None] - steps).abs().amin(dim=-1)
    torch.testing.assert_close((states - round_int8(states)).abs(), off, atol=1e-5, rtol=1e-3)
    assert torch.equal(round_int8(torch.zeros(1, 1, 8)), torch.zeros(1, 1, 8))


def test_losses_of_a_model(outcome):
    pytest.importorskip("deltadecode_embedded")
    code, out, err = outcome(
        partial(launch, memory),
        *("--rounding", "embedded", "--context", 300, "--steps", 2, "--texts", 1, "--budget", 12),
        "--json",
    )
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [(row["number"], row["scales"], row["protected"], row["of"]) for row in rows] == [
        (one.number, one.scales, one.protected, one.of) for one in ROUNDINGS[1:]
    ]
    for row in rows:
        assert row["added"] == pytest.approx(row["ours"] - row["theirs"], abs=1e-4)
        assert row["added"] != 0 and len(row["of_texts"]) == 1
