"""Sink metrics against maps that ``eager`` attention returns, and by their definition."""

import pytest
import torch
from inspection_models import COMMON, FAMILIES, NAMES, eager_maps, full_layers, make, prompt
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from deltadecode.errors import InspectionError, UnsupportedModelError
from deltadecode.lab.inspection.measure import HiddenMeasure, LayerMeasure, Measure, measure
from deltadecode.lab.inspection.sinks import describe, find_sinks, sink_heads

TOKENS = 150


def by_definition(weights):
    """α of a map [H, T, T]: the mean of each column over the rows from the diagonal down."""
    heads, tokens, _ = weights.shape
    return torch.tensor(
        [[weights[h, k:, k].mean().item() for k in range(tokens)] for h in range(heads)]
    )


def maps_by_layer(model, output):
    """Map of each full-attention layer; linear-attention layers of a hybrid have none."""
    maps, layers = output.attentions, full_layers(model)
    if len(maps) == len(layers):
        return dict(zip(layers, maps, strict=True))
    return {layer: maps[layer] for layer in layers}


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """A model, what was measured in it, and its eager maps."""
    model = make(request.param)
    ids = prompt(model, TOKENS)
    # Blocks of a few queries, so that there are many and the last is smaller.
    heads = model.config.num_attention_heads
    found = measure(model, ids, block_bytes=4 * heads * TOKENS * 7)
    return request.param, model, ids, found, eager_maps(model, ids)


def test_mean_weights_are_those_of_the_eager_maps(case):
    _, model, _, found, output = case
    maps = maps_by_layer(model, output)
    assert [each.layer for each in found.attention] == list(maps) == full_layers(model)
    for each in found.attention:
        torch.testing.assert_close(each.mean, by_definition(maps[each.layer][0]), rtol=0, atol=1e-4)


def test_sink_rates_are_those_of_the_eager_maps(case):
    _, model, _, found, output = case
    maps = maps_by_layer(model, output)
    epsilon = 0.1  # random models have few sinks above 0.3
    said = describe(found, ["x"] * TOKENS, 8, epsilon, 20)
    means = torch.stack([by_definition(each[0]) for each in maps.values()])
    above = means[:, :, : TOKENS - 19] > epsilon
    assert said["first_token_rate"] == pytest.approx(above[:, :, 0].float().mean().item(), abs=1e-4)
    assert said["rate"] == pytest.approx(above.any(dim=2).float().mean().item(), abs=1e-4)
    for place, layer in enumerate(said["layers"]):
        assert layer["rate"] == pytest.approx(
            above[place].any(dim=1).float().mean().item(), abs=1e-4
        )
        assert layer["top_mean"] == pytest.approx(
            means[place, :, : TOKENS - 19].amax(dim=1).tolist(), abs=1e-4
        )
    expected = {k: int(above[:, :, k].sum()) for k in range(TOKENS - 19) if above[:, :, k].any()}
    assert {sink["position"]: sink["heads"] for sink in said["sinks"]} == expected


def test_what_a_learned_sink_takes_is_what_the_maps_lack(case):
    name, model, _, found, output = case
    maps = maps_by_layer(model, output)
    for each in found.attention:
        if name not in ("learned", "off-by-one"):
            assert each.learned is None
            continue
        lacks = 1 - maps[each.layer][0].sum(dim=2).mean(dim=1)
        assert lacks.max() > 1e-3
        torch.testing.assert_close(each.learned, lacks, rtol=0, atol=1e-4)


def test_the_gate_is_what_lies_between_attention_and_its_projection(case):
    name, model, ids, found, output = case
    if name != "gated":
        assert all(each.gate is None for each in found.attention)
        return
    seen = {}
    hooks = [
        getattr(model.model.layers[each.layer].self_attn, part).register_forward_hook(
            lambda module, inputs, out, key=(each.layer, part): seen.update({key: out[0]})
        )
        for each in found.attention
        for part in ("q_proj", "v_proj")
    ]
    eager_maps(model, ids)
    for hook in hooks:
        hook.remove()
    for each in found.attention:
        dim = model.config.head_dim
        gate = seen[each.layer, "q_proj"].view(TOKENS, -1, 2 * dim)[..., dim:].sigmoid()
        values = seen[each.layer, "v_proj"].view(TOKENS, -1, dim)
        values = values.repeat_interleave(gate.shape[1] // values.shape[1], dim=1)
        weights = maps_by_layer(model, output)[each.layer][0]
        out = torch.einsum("hqk,khd->qhd", weights, values)
        expected = ((out * gate).norm(dim=2) / out.norm(dim=2)).mean(dim=0)
        torch.testing.assert_close(each.gate, expected, rtol=0, atol=1e-4)


def test_value_norms_are_those_of_the_value_projection(case):
    name, model, ids, found, _ = case
    for each in found.attention:
        seen = []
        # Gemma normalizes its values; layers from 4 on reuse those of layer 3.
        gemma = name in FAMILIES
        attention = model.model.layers[min(each.layer, 3) if gemma else each.layer].self_attn
        projection = attention.v_norm if gemma else attention.v_proj
        hook = projection.register_forward_hook(
            lambda module, inputs, out, seen=seen: seen.append(out)
        )
        eager_maps(model, ids)
        hook.remove()
        kv_heads = 1 if name == "gemma4" else model.config.num_key_value_heads
        values = seen[0].view(TOKENS, kv_heads, -1)
        expected = values.pow(2).sum(dim=2).sqrt().T
        torch.testing.assert_close(each.value_norm, expected, rtol=0, atol=1e-4)


def test_hidden_states_are_the_model_s_own(case):
    name, model, _, found, output = case
    assert len(found.hidden) == model.config.num_hidden_layers
    # The last of them is given behind the final norm.
    for each, states in zip(found.hidden, output.hidden_states[1:-1], strict=False):
        if name == "gemma3n":  # states of all AltUp streams; layers read and write the first
            assert states.dim() == 4
            states = states[model.config.altup_active_idx]
        torch.testing.assert_close(each.norm, states[0].norm(dim=1), rtol=1e-4, atol=1e-4)
        assert each.peak == pytest.approx(states.abs().max().item(), rel=1e-4)
        assert states[0, each.peak_token, each.peak_channel].abs() == pytest.approx(
            each.peak, rel=1e-4
        )
        assert each.median == pytest.approx(states.abs().median().item(), rel=1e-4)


def test_the_layers_are_those_of_the_text_part():
    """A vision tower as deep as the text part comes before it."""
    size = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**COMMON, "layer_types": ["full_attention"] * 4},
        vision_config={**size, "intermediate_size": 16, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4, image_token_index=60, boi_token_index=59, eoi_token_index=58,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    ids = prompt(model.model.language_model, 40)[:, :40].clamp(max=50)
    found = measure(model, ids)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        states = model(ids, output_hidden_states=True).hidden_states
    assert len(found.hidden) == 4
    for each, expected in zip(found.hidden, states[1:-1], strict=False):
        torch.testing.assert_close(each.norm, expected[0].norm(dim=1), rtol=1e-4, atol=1e-4)


def test_a_model_is_left_as_it_was():
    model = make("learned")
    ids = prompt(model, 40)
    before = model(ids).logits
    measure(model, ids)
    assert model.config._attn_implementation == "eager"
    assert not model.model.layers[0]._forward_hooks
    assert not model.model.layers[1].self_attn.o_proj._forward_pre_hooks
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


def test_no_copy_of_a_block_is_larger_than_stated(monkeypatch):
    from deltadecode.lab.inspection import measure as module

    sizes = []

    class Spy(module.Scores):
        def logits(self, query, key):
            found = super().logits(query, key)
            sizes.append(4 * found.numel())
            return found

    monkeypatch.setattr(module, "Scores", Spy)
    model = make("llama")
    measure(model, prompt(model, 300), block_bytes=50_000)
    assert len(sizes) > 4 * 20 and max(sizes) <= 50_000


class Sizes(TorchDispatchMode):
    """Notes every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.seen += [(leaf.numel(), leaf.dtype, tuple(leaf.shape)) for leaf in leaves]
        return out


@pytest.mark.parametrize("name", ["llama", "learned", "off-by-one", "gated"])
def test_no_map_is_ever_whole(monkeypatch, name):
    """Whatever makes it, in any layer; only the mask of gpt-oss has T² entries, a byte each."""
    from deltadecode.engines.transformers import full

    tokens = 500
    monkeypatch.setattr(full, "_SCORE_BYTES", 50_000)  # what layers that are not measured hold
    model = make(name)
    with Sizes() as sizes:
        measure(model, prompt(model, tokens), block_bytes=50_000)
    assert len(sizes.seen) > 1000
    whole = {found for found in sizes.seen if found[0] >= tokens**2}
    has_mask = name in ("learned", "off-by-one")
    assert {found[1:] for found in whole} == (
        {(torch.bool, (1, 1, tokens, tokens))} if has_mask else set()
    )


def synthetic():
    """Two layers of two heads that share one KV head; T = 10."""
    means = torch.full((2, 2, 10), 0.01)
    means[0, 0, 0] = 0.5
    means[1, 0, 0] = 0.4
    means[1, 1, 4] = 0.9
    means[0, 1, 9] = 1.0  # a head that looks at the token itself; one query sees token 9
    values, hidden = torch.ones(1, 10), torch.ones(10)
    values[0, 0], hidden[0] = 0.1, 50.0
    layers = tuple(LayerMeasure(3 + i, means[i], None, None, values.clone()) for i in range(2))
    states = (HiddenMeasure(hidden, 2000.0, 0, 7, 1.0),)
    return Measure(10, layers, states)


def test_sinks_by_hand():
    found = synthetic()
    above = sink_heads(found, 0.3, 4)
    assert above.nonzero().tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 4]]
    first, second = find_sinks(found, above)
    assert (first.position, first.heads, first.layer, first.head) == (0, 2, 3, 0)
    assert first.mean == 0.5
    assert first.value_ratio == pytest.approx(0.1) and first.hidden_ratio == pytest.approx(50.0)
    assert (second.position, second.heads, second.layer, second.head) == (4, 1, 4, 1)
    said = describe(found, list("abcdefghij"), 4, least_queries=4)
    assert said["first_token_rate"] == 0.5 and said["rate"] == 0.75
    assert said["kinds"] == {"a": 1, "e": 1}
    assert [sink["page"] for sink in said["sinks"]] == [0, 1]
    assert said["hidden"][0]["massive"] and said["hidden"][0]["norm_text"] == "a"


def test_a_mean_over_few_queries_makes_no_sink():
    found = synthetic()
    assert sink_heads(found, 0.3, 1)[0, 1, 9]
    assert not sink_heads(found, 0.3, 2)[:, :, 9].any()


@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (5,)])
def test_other_texts_than_one_row_are_refused(shape):
    with pytest.raises(InspectionError, match="text is \\[1, T >= 2\\] token ids, got"):
        measure(make("llama"), torch.ones(shape, dtype=torch.long))


def test_a_model_without_full_attention_is_refused():
    model = make("llama")
    model.config.layer_types = ["sliding_attention"] * 4
    with pytest.raises(UnsupportedModelError, match="no full-attention layer"):
        measure(model, prompt(model, 5))
