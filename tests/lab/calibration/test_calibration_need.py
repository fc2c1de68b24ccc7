"""A layer's need against a model whose layer is limited by hand, in one pass over its text."""

import numpy as np
import pytest
import torch
from calibration_cases import Tokenizer, tiny_model, token_ids
from shared_kv_models import FAMILIES, FULL_LAYERS, shared_kv_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from deltadecode.lab.calibration.need import Need
from deltadecode.lab.observe import Prompt, observe

SIZE, RECENT, SINK, NEW, LAST = 4, 2, 1, 12, 6


def logits(model, text, layer=None, first=0):
    """Centred logits of a whole text; from `first` on, one layer sees recent and sink pages."""
    n = len(text)
    page = torch.arange(n) // SIZE
    hidden = (page[:, None] - page[None] >= RECENT) & (page[None] >= SINK)
    hidden[:first] = False

    def limit(module, args, kwargs):
        kwargs["attention_mask"] = kwargs["attention_mask"].masked_fill(hidden, -1e30)
        return args, kwargs

    handle = None
    if layer is not None:
        module = model.model.layers[layer].self_attn
        handle = module.register_forward_pre_hook(limit, with_kwargs=True)
    with torch.no_grad():
        found = model(torch.tensor([text])).logits[0].double()
    if handle is not None:
        handle.remove()
    return found - found.mean(dim=1, keepdim=True)


def by_hand(model, text, layers, first, last):
    stock = model.config._attn_implementation
    model.set_attn_implementation("eager")
    full = logits(model, text)[first:last]
    found = []
    for layer in layers:
        moved = (logits(model, text, layer, first)[first:last] - full).norm(dim=1)
        found.append(float((moved / full.norm(dim=1)).mean()))
    model.set_attn_implementation(stock)
    return found


def written(model, ids, eos=None):
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=eos
        )
    return out[0].tolist()


def gemma():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2, initializer_range=0.4,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("family", ["llama", "sliding", *FAMILIES])
def test_need_is_that_of_a_layer_limited_by_hand(family):
    # Gemma's sliding-window caches cannot be cut, and take the other way.
    model, layers = {
        "llama": lambda: (tiny_model(), range(5)),
        "sliding": lambda: (gemma(), (1, 3)),
    }.get(family, lambda: (shared_kv_model(family), FULL_LAYERS))()
    prompts = [Prompt(i, token_ids(length, i)) for i, length in enumerate((41, 30))]
    need = Need(model, 2, layers, SIZE, RECENT, SINK, tokens=LAST)
    observe(model, Tokenizer(), prompts, [need], page_size=SIZE, new_tokens=NEW, batch=2)
    for prompt in prompts:
        text = written(model, prompt.ids)[:-1]  # the last one is never read
        expected = by_hand(model, text, layers, len(text) - LAST, len(text))
        np.testing.assert_allclose(need.weights([prompt.number]), expected, rtol=1e-3, atol=1e-6)
    assert max(expected) > 1.05 * min(expected) > 0


def test_tokens_after_the_end_do_not_count():
    model = tiny_model()
    ids = token_ids(41, 0)
    end = written(model, ids)[len(ids) + 8]
    stop = written(model, ids).index(end, len(ids))
    prompts = [Prompt(0, ids), Prompt(1, token_ids(41, 1))]
    need = Need(model, 2, range(5), SIZE, RECENT, SINK, tokens=LAST)
    observe(model, Tokenizer(end), prompts, [need], page_size=SIZE, new_tokens=NEW, batch=2)
    text = written(model, ids)[:stop]
    first = len(ids) + NEW - 1 - LAST
    assert first < stop < len(ids) + NEW - 2
    expected = by_hand(model, text, range(5), first, stop)
    np.testing.assert_allclose(need.weights([0]), expected, rtol=1e-3)
    assert model.config._attn_implementation == "sdpa"
