"""A model made to have sinks, and whose Δ-layer is made to miss them."""

import pytest
import torch
from inspection_models import COMMON
from transformers import LlamaConfig, LlamaForCausalLM

from deltadecode import DeltaConfig
from deltadecode.lab.inspection.report import make_report, summary_lines
from deltadecode.lab.inspection.run import inspect_text

MARK, LOOKS, TOKENS, CONTEXT = 7, 30.0, 97, 64
# Its rotary pair turns by less than 0.1 over the text, so that it stays a direction.
SLOW = 3


def made(*strengths):
    """Layer i's heads look at the token MARK, wherever it is; with a negative strength, away."""
    config = LlamaConfig(
        **{**COMMON, "initializer_range": 0.1}, attention_bias=True, attn_implementation="eager"
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        embedded = model.model.embed_tokens.weight
        embedded[:, 0] = 0.0
        embedded[MARK] = 0.0
        embedded[MARK, 0] = 3.0
        for layer, strength in zip(model.model.layers, strengths, strict=True):
            # Channel 0 is MARK's alone: nothing else writes it, and the keys read it.
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
            keys = layer.self_attn.k_proj.weight.view(2, 8, 32)
            keys[:, :, 0] = 0.0
            keys[:, SLOW, 0] = 1.0
            layer.self_attn.q_proj.bias.view(4, 8)[:, SLOW] = strength
    return model


def text(place):
    ids = torch.randint(8, 60, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    ids[place] = MARK
    return ids


def report(place, *strengths, epsilon=0.3):
    cfg = DeltaConfig(page_size=4, budget_pages=6, recent_pages=2, sink_pages=0, dense_layers=(),
                      delta_layers=(0, 2))  # fmt: skip
    found = inspect_text(made(*strengths), text(place), CONTEXT, cfg, epsilon=epsilon)
    return make_report(found, str, {}, epsilon)


@pytest.mark.parametrize("place", [0, 13])
def test_a_sink_is_found_where_it_was_put(place):
    found = report(place, LOOKS, LOOKS, LOOKS, LOOKS)
    sinks = found["sinks"]
    assert [each["position"] for each in sinks["sinks"]] == [place]
    assert sinks["rate"] == 1.0 and sinks["first_token_rate"] == float(place == 0)
    assert sinks["sinks"][0]["token"] == str(MARK) and sinks["sinks"][0]["page"] == place // 4
    on_first = [each["mass"] for each in found["first_page"]]
    assert min(on_first) > 0.9 if place == 0 else max(on_first) < 0.1
    if place == 0:
        assert all(each["missed"] == 0.0 for each in found["first_page"])


def test_only_the_layers_that_were_made_so_have_one():
    layers = report(0, -LOOKS, LOOKS, -LOOKS, LOOKS)["sinks"]["layers"]
    assert [min(each["first_mean"]) > 0.9 for each in layers] == [False, True, False, True]
    assert [max(each["first_mean"]) < 0.05 for each in layers] == [True, False, True, False]


def test_a_delta_layer_that_looks_away_misses_the_page_its_sparse_layer_needs():
    found = report(0, -LOOKS, LOOKS, LOOKS, LOOKS)
    first, sparse, second, last = found["first_page"]
    assert first["missed"] == 1.0 and second["missed"] == 0.0
    assert sparse["source_missed"] == 1.0 and sparse["missed_mass"] == sparse["mass"] > 0.9
    assert last["source_missed"] == 0.0 and last["missed_mass"] is None
    forced = {each["sink_pages"]: each["kl"] for each in found["losses"]["sink_pages"]}
    removed = {each["name"]: each["kl"] for each in found["losses"]["removal"]}
    # Left to selection, layer 1 lacks the page; masked out, layer 3 does too.
    assert forced[1] < 0.1 * forced[0] < removed["DELTA, sink pages masked out"]
    assert removed["full attention, middle pages masked out (control)"] < 0.1 * forced[0]
    assert "Δ-layer 0 misses the first page in 100.0% of the steps" in summary_lines(found)


def test_heads_with_a_sink_are_those_that_a_factor_moves():
    weak = 0.1 * LOOKS  # a sink that takes all leaves a factor nothing to share out
    found = report(0, -LOOKS, weak, -LOOKS, weak)["losses"]["factors"]
    full = [each for each in found if each["under"] == "full attention"]
    moved = {(each["heads"], each["factor"]): each["kl"] for each in full}
    for factor in (0.5, 2.0):
        assert moved["without", factor] < 0.1 * moved["with a sink", factor]
        assert moved["with a sink", factor] == pytest.approx(moved["all", factor], rel=0.3)
