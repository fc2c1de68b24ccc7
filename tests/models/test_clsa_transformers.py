"""What callers of Transformers do with a model and its caches: the right numbers, or one line."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from clsa_models import make_config, make_model
from transformers import GenerationConfig

from deltadecode.errors import (
    ArgumentError,
    ModelConfigError,
    UnsupportedCacheError,
    UnsupportedModelError,
)
from deltadecode.models.clsa import ClsaCache, ClsaConfig, ClsaForCausalLM, ClsaStaticCache
from deltadecode.models.clsa.decode import pick, rows_of
from deltadecode.models.clsa.inputs import valid_tokens

MODES = ("clsa", "yoco", "transformer")


def _ids(rows, tokens):
    return torch.randint(1, 64, (rows, tokens))


def _static(model, rows=2, tokens=30):
    return ClsaStaticCache(model.config, rows, tokens, model.dtype, model.device)


def _generate(model, ids=None, **options):
    return model.generate(ids, **{"max_new_tokens": 5, "do_sample": False, **options}).tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [None, "static"])
def test_a_model_in_training_generates_what_it_does_otherwise(mode, kind):
    model, ids = make_model(mode=mode), _ids(2, 12)
    wanted = _generate(model, ids)
    model.train()
    model.gradient_checkpointing_enable()
    assert _generate(model, ids, cache_implementation=kind) == wanted
    # With gradients, layers would write their tokens twice.
    with pytest.raises(UnsupportedCacheError, match="past_key_values cannot be given"):
        model(ids, past_key_values=ClsaCache(model.config))


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_hidden_states_end_with_what_the_head_reads(mode):
    model, ids = make_model(mode=mode), _ids(2, 9)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 5
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits, rtol=0, atol=0)
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    torch.testing.assert_close(model(ids).hidden_states, out.hidden_states, rtol=0, atol=0)
    with pytest.raises(ArgumentError, match="gives logits alone, got output_hidden_states"):
        model(ids, past_key_values=_static(model))
    model.set_attn_implementation("eager")  # Transformers lets nobody else ask for weights
    model.config.output_attentions = True
    with pytest.raises(ArgumentError, match="gives no attention weights"):
        model(ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_prompt_selects_by_scores_as_exact_as_those_of_a_step(dtype):
    """Rounded to bfloat16, most of these scores are ties, and the lowest tokens win them."""
    model, tokens = make_model(dtype, index_topk=8).model, 64
    query = torch.ones(1, tokens, 8, dtype=dtype)
    keys = torch.full((1, tokens, 8), 2.0, dtype=dtype)
    keys[0, :, 0] += torch.arange(tokens, dtype=dtype) * 2.0**-5
    mask = model._selected(query, keys, None).mask[0, 0]
    table, lengths = rows_of(keys, None)
    step = pick(query[:, -1], keys, table, lengths, 8)
    assert step.ids[0].tolist() == list(range(tokens - 8, tokens))
    assert mask[-1].nonzero()[:, 0].tolist() == step.ids[0].tolist()
    with torch.autocast("cpu", torch.bfloat16):
        assert model._selected(query.float(), keys.float(), None).mask[0, 0].equal(mask)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_decodes_from_a_cache_of_the_model_s_dtype(mode):
    model, ids = make_model(torch.float32, mode=mode), _ids(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        found = [
            model.generate(
                ids, max_new_tokens=3, do_sample=False, cache_implementation=kind,
                output_logits=True, return_dict_in_generate=True,
            ).logits
            for kind in (None, "static")
        ]  # fmt: skip
    torch.testing.assert_close(found[1][0], found[0][0])
    assert all(logits.isfinite().all() for logits in found[1])


@torch.no_grad()
def test_a_compiled_pass_takes_masks_without_a_break():
    model, ids = make_model(), _ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    whole = torch.compile(model, backend="eager", fullgraph=True)
    for given in (mask, torch.ones_like(ids)):
        wanted = model(ids, attention_mask=given).logits[given.bool()]
        found = whole(ids, attention_mask=given).logits[given.bool()]
        torch.testing.assert_close(found, wanted)
    assert valid_tokens(torch.ones_like(ids), 2, 12) is None


@pytest.mark.parametrize("mode", MODES)
def test_embedded_prompts_decode_from_both_caches(mode):
    model, ids = make_model(mode=mode, max_position_embeddings=17), _ids(2, 12)
    wanted, embeds = _generate(model, ids), model.get_input_embeddings()(ids).detach()
    for kind in (None, "static"):
        made = _generate(model, inputs_embeds=embeds, cache_implementation=kind)
        assert made == [row[12:] for row in wanted]
        with pytest.raises(ArgumentError, match="the model's 17 positions, got 19 tokens"):
            _generate(model, inputs_embeds=embeds, cache_implementation=kind, max_new_tokens=7)


@pytest.mark.parametrize("kind", [None, "static"])
def test_the_last_token_written_needs_no_position(kind):
    model, ids = make_model(), _ids(2, 12)
    wanted = _generate(model, ids, max_new_tokens=6)
    model.config.max_position_embeddings = 17
    options = {"cache_implementation": kind}
    assert _generate(model, ids, max_new_tokens=6, **options) == wanted
    with pytest.raises(ArgumentError, match="the model's 17 positions, got 19 tokens"):
        _generate(model, ids, max_new_tokens=7, **options)


@pytest.mark.parametrize("mode", MODES)
def test_drafts_of_assisted_decoding_change_no_token(mode):
    model, ids = make_model(mode=mode), _ids(1, 12).repeat(1, 2)
    wanted = _generate(model, ids, max_new_tokens=12)
    drafter = make_model(mode="yoco", num_hidden_layers=2, sliding_window=3)
    for drafts in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": drafter}):
        assert _generate(model, ids, max_new_tokens=12, **drafts) == wanted
    given = {"prompt_lookup_num_tokens": 3, "past_key_values": _static(model, 1, 40)}
    with pytest.raises(UnsupportedCacheError, match="cannot take tokens back"):
        _generate(model, ids, **given)
    with pytest.raises(ArgumentError, match="got assistant_early_exit=2"):
        _generate(model, ids, assistant_early_exit=2)
    assert _generate(model, ids, max_new_tokens=12) == wanted


@pytest.mark.parametrize("mode", MODES)
def test_a_conversation_goes_on_in_its_cache(mode):
    model, ids = make_model(mode=mode), _ids(2, 12)
    first = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    asked = torch.cat((first.sequences, _ids(2, 4)), 1)
    held = copy.deepcopy(first.past_key_values), pickle.dumps(first.past_key_values)
    wanted = _generate(model, asked)
    for cache in (first.past_key_values, held[0], pickle.loads(held[1])):
        assert _generate(model, asked, past_key_values=cache) == wanted
    with pytest.raises(ArgumentError, match="past_key_values or cache_implementation"):
        _generate(model, ids, past_key_values=first.past_key_values, cache_implementation="static")


@torch.no_grad()
def test_a_window_takes_back_what_it_holds_or_nothing():
    model, ids = make_model(), _ids(2, 20)
    wanted = model(ids).logits
    cache = model(ids[:, :10], use_cache=True).past_key_values
    with pytest.raises(UnsupportedCacheError, match="a window of 5 tokens cannot take 1 back"):
        cache.crop(-1)
    torch.testing.assert_close(model(ids[:, 10:12], past_key_values=cache).logits, wanted[:, 10:12])
    # Recorded from here on: the next two can be taken back, and not three.
    cache.activate_past_recording()
    model(ids[:, 12:14], past_key_values=cache)
    with pytest.raises(UnsupportedCacheError, match="cannot take 3 back, since those before them"):
        cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [14] * 4
    cache.crop(-2)
    torch.testing.assert_close(model(ids[:, 12:], past_key_values=cache).logits, wanted[:, 12:])
    with pytest.raises(UnsupportedCacheError, match="of 20 tokens cannot take 21 back"):
        cache.crop(-21)


def test_a_growing_cache_has_no_longest_context():
    cache = ClsaCache(make_config())
    assert cache.get_max_length() == -1 and cache.get_max_length(0) == 5


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_cache_of_another_shape_is_refused(mode):
    model, ids = make_model(mode=mode), _ids(2, 6)
    others = [{"mode": "yoco" if mode == "clsa" else "clsa"}, {"num_hidden_layers": 2}]
    others += [{"num_key_value_heads": 1}, {"head_dim": 4}]
    others += [] if mode == "transformer" else [{"sliding_window": 3}]
    others += [{"index_head_dim": 4}] if mode == "clsa" else []
    for other in others:
        config = make_config(**{"mode": mode, **other})
        for cache in (
            ClsaCache(config),
            ClsaStaticCache(config, 2, 20, model.dtype, model.device),
        ):
            with pytest.raises(UnsupportedCacheError, match=f"a model with {next(iter(other))} "):
                model(ids, past_key_values=cache)
    # How many tokens are selected is not in a cache.
    more = ClsaCache(make_config(mode=mode, index_topk=3))
    torch.testing.assert_close(model(ids, past_key_values=more).logits, model(ids).logits)


@torch.no_grad()
def test_a_static_cache_does_or_refuses_what_a_cache_can():
    model, ids = make_model(), _ids(2, 20)
    wanted, cache = model(ids).logits, _static(model)
    assert cache and len(cache) == 4 and not cache.is_croppable
    kept = model(ids[:, :10], past_key_values=cache, logits_to_keep=3).logits
    torch.testing.assert_close(kept, wanted[:, 7:10])
    for change in (
        lambda: cache.batch_select_indices(torch.tensor([1, 0])),
        lambda: cache.batch_repeat_interleave(2),
    ):
        with pytest.raises(UnsupportedCacheError, match="keeps its 2 rows"):
            change()
    cache.graph = lambda: None  # no copy or pickle can hold a CUDA graph either
    other = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
    assert other.graph is None and cache.graph is not None
    cache.graph = None
    for one in (other, cache):
        step = model(ids[:, 10:11], past_key_values=one).logits
        torch.testing.assert_close(step, wanted[:, 10:11])
    cache.reset()
    for name, value in (("labels", ids), ("index_loss", True)):
        with pytest.raises(ArgumentError, match=f"gives logits alone, got {name}"):
            model(ids, past_key_values=cache, **{name: value})


@pytest.mark.parametrize("mode", MODES)
def test_a_static_cache_takes_padding_wherever_no_window_needs_it(mode):
    model, ids, masks = make_model(mode=mode), _ids(2, 14), torch.ones(3, 2, 14).long()
    masks[0, 0, 9:] = 0  # behind the tokens
    masks[1, 0, 11] = 0  # among those of the window
    masks[2, 0, 3:8] = 0  # before those
    refused = masks[:2] if mode != "transformer" else []
    for mask in refused:
        with pytest.raises(UnsupportedCacheError, match="with padding before their tokens"):
            _generate(model, ids, attention_mask=mask, cache_implementation="static")
    wanted = _generate(model, ids, attention_mask=masks[2])
    assert _generate(model, ids, attention_mask=masks[2], cache_implementation="static") == wanted


@torch.no_grad()
def test_a_static_cache_refuses_positions_that_its_steps_would_not_follow():
    model, ids = make_model(), _ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    own = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = model(ids, attention_mask=mask, position_ids=own).logits[:, -1:]
    for given in (own, own + 3, own.masked_fill(mask == 0, 7)):
        options = {"attention_mask": mask, "position_ids": given}
        found = model(ids, past_key_values=_static(model), **options).logits
        torch.testing.assert_close(found, wanted)
    for given in ({"attention_mask": mask, "position_ids": own * 2}, {"position_ids": own}):
        with pytest.raises(ArgumentError, match="position_ids that count a row's tokens"):
            model(ids, past_key_values=_static(model), **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": torch.ones(0, 4).long()}, r"input_ids must be \[B, Q\], .* got \[0, 4\]"),
        ({"input_ids": torch.ones(2, 0).long()}, r"of one token or more, got \[2, 0\]"),
        ({"input_ids": torch.ones(4).long()}, r"of one token or more, got \[4\]"),
        ({"inputs_embeds": torch.ones(2, 32)}, r"inputs_embeds must be \[B, Q, hidden\]"),
        ({}, "give input_ids or inputs_embeds"),
        ({"position_ids": torch.arange(4)}, r"position_ids must be \[2, 4\], .* got \[4\]"),
        ({"position_ids": torch.ones(1, 3)}, r"one for each new token, got \[1, 3\]"),
        ({"attention_mask": [[1] * 4] * 2}, r"attention_mask must be \[2, 4\], .* got list"),
    ],
)
def test_input_of_other_shapes_is_refused(given, message):
    if "position_ids" in given or "attention_mask" in given:
        given = {"input_ids": torch.ones(2, 4).long(), **given}
    with pytest.raises(ArgumentError, match=message):
        make_model()(**given)


def test_continuous_batching_is_refused():
    model, ids = make_model(torch.float32), _ids(2, 6)
    with pytest.raises(UnsupportedModelError, match="cannot batch requests continuously"):
        model.generate_batch(ids.tolist(), GenerationConfig(max_new_tokens=2))
    with pytest.raises(UnsupportedModelError, match="cannot batch requests continuously"):
        _generate(model, ids, cache_implementation="paged")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be True or False, got 'no'"),
        ({"use_cache": 1}, "use_cache must be True or False, got 1"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "nothing else, got rope_scaling"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "nothing else, got rope_parameters"),
        ({"rope_parameters": 1e6}, "nothing else, got rope_parameters"),
    ],
)
def test_options_that_would_do_nothing_are_refused(changes, message):
    with pytest.raises(ModelConfigError, match=message):
        make_config(**changes)
    plain = {"rope_type": "default", "rope_theta": 1e4}
    config = make_config(rope_parameters=plain, rope_scaling=None)
    assert config.rope_theta == 1e4
    config.rope_parameters = {"rope_type": "yarn", "factor": 2.0}
    with pytest.raises(ModelConfigError, match="nothing else, got rope_parameters"):
        ClsaForCausalLM(config)


def test_a_checkpoint_has_the_layers_that_it_has(tmp_path):
    make_model().save_pretrained(tmp_path)
    for made in (ClsaConfig, ClsaForCausalLM):
        with pytest.raises(ModelConfigError, match=r"of 4 layers, .* not the weights of 2"):
            made.from_pretrained(tmp_path, num_hidden_layers=2)
    assert ClsaForCausalLM.from_pretrained(tmp_path, num_hidden_layers=4).config.self_layers == 2


@torch.no_grad()
def test_a_static_cache_forgets_the_graph_of_another_model():
    first, second, ids = make_model(), make_model(), _ids(2, 7)
    cache = _static(first)
    first(ids, past_key_values=cache)
    cache.graph = graph = SimpleNamespace(model=first)
    for model, kept in ((first, graph), (second, None)):
        cache.reset()
        model(ids, past_key_values=cache)
        assert cache.graph is kept
    assert pickle.loads(pickle.dumps(cache)).seen == cache.seen
