"""The CLSA classes against the definition, and what Transformers expects of a model."""

import pytest
import torch
from clsa_models import make_config, make_model, step_by_step
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import deltadecode as dd
from deltadecode.engines.transformers.interface import attention_modules
from deltadecode.errors import (
    ArgumentError,
    ModelConfigError,
    UnsupportedCacheError,
    UnsupportedModelError,
)
from deltadecode.models.clsa import (
    ClsaCache,
    ClsaConfig,
    ClsaForCausalLM,
    ClsaModel,
    attention,
    reference,
)
from deltadecode.models.clsa.attention import Window, largest, seen
from deltadecode.models.clsa.layers import ClsaSharedKV

MODES = ("clsa", "yoco", "transformer")


def _ids(rows, tokens):
    return torch.randint(1, 64, (rows, tokens))


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_forward_pass_is_the_definition(mode):
    model, ids = make_model(mode=mode), _ids(2, 17)
    wanted = torch.stack([reference.logits(model, row.tolist()) for row in ids])
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_step_by_step_is_one_forward_pass(mode):
    model, ids = make_model(mode=mode), _ids(2, 23)
    whole = model(ids).logits
    torch.testing.assert_close(step_by_step(model, ids), whole, rtol=1e-9, atol=1e-9)
    # A prompt, then several tokens at once, then one.
    cache = model(ids[:, :14], use_cache=True, logits_to_keep=1).past_key_values
    some = model(ids[:, 14:22], past_key_values=cache, use_cache=False).logits
    last = model(ids[:, 22:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([some, last], 1), whole[:, 14:], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_as_many_tokens_as_there_are_make_clsa_yoco():
    clsa, yoco = make_model(index_topk=30), make_model(mode="yoco")
    yoco.load_state_dict(clsa.state_dict(), strict=False)
    ids = _ids(2, 30)
    torch.testing.assert_close(clsa(ids).logits, yoco(ids).logits, rtol=0, atol=0)
    torch.testing.assert_close(step_by_step(clsa, ids), yoco(ids).logits, rtol=1e-9, atol=1e-9)
    clsa.config.index_topk = 29
    assert (clsa(ids).logits - yoco(ids).logits)[:, -1].abs().max() > 1e-6


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_padding_changes_no_row(mode):
    model, lengths, total = make_model(mode=mode), (3, 19, 12), 19
    ids = _ids(3, total)
    mask = torch.stack([torch.arange(total) >= total - length for length in lengths]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": positions}
    for logits in (model(ids, **given).logits, step_by_step(model, ids, **given)):
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, total - length :]).logits[0]
            torch.testing.assert_close(logits[row, -length:], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_generate_follows_the_definition_for_each_row_of_a_padded_batch(mode):
    model, lengths = make_model(mode=mode), (9, 14)
    ids = _ids(2, 14)
    mask = torch.stack([torch.arange(14) >= 14 - length for length in lengths]).long()
    made = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, length in enumerate(lengths):
        tokens = ids[row, 14 - length :].tolist()
        for _ in range(6):
            tokens.append(int(reference.logits(model, tokens)[-1].argmax()))
        assert made[row, 14 - length :].tolist() == tokens


def test_generate_samples_and_searches_by_beams():
    model, ids = make_model(torch.float32), _ids(2, 9)
    torch.manual_seed(3)
    sampled = model.generate(ids, max_new_tokens=5, do_sample=True, num_return_sequences=2)
    assert sampled.shape == (4, 14)
    with_cache = model.generate(ids, max_new_tokens=5, num_beams=2, do_sample=False)
    without = model.generate(ids, max_new_tokens=5, num_beams=2, do_sample=False, use_cache=False)
    assert with_cache.tolist() == without.tolist()


@torch.no_grad()
def test_only_the_last_token_goes_through_the_cross_decoder():
    model, ids, counts = make_model(), _ids(1, 20), []
    model.model.layers[-1].register_forward_hook(lambda m, i, o: counts.append(o.shape[1]))
    model(ids, logits_to_keep=1)
    model(ids, logits_to_keep=torch.tensor([3, 4]))
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert counts == [1, 20, 1, 1]


@torch.no_grad()
def test_the_cache_keeps_windows_and_one_layer_of_everything():
    model = make_model()
    cache = model(_ids(2, 20), use_cache=True).past_key_values
    shapes = [tuple(layer.keys.shape) for layer in cache.layers]
    assert shapes == [(2, 2, 4, 8), (2, 2, 4, 8), (2, 1, 20, 16), (2, 1, 20, 8)]
    assert cache.layers[3].values.numel() == 0
    assert cache.layers[0].keys.untyped_storage().nbytes() == 2 * 2 * 4 * 8 * 8


@torch.no_grad()
def test_a_window_of_one_token_holds_nothing():
    model, ids = make_model(sliding_window=1), _ids(1, 12)
    torch.testing.assert_close(step_by_step(model, ids), model(ids).logits, rtol=1e-9, atol=1e-9)
    assert model(ids, use_cache=True).past_key_values.layers[0].keys.shape[2] == 0


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_saved_model_loads_as_it_was(mode, tmp_path):
    model, ids = make_model(mode=mode), _ids(1, 12)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is ClsaConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is ClsaModel
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    assert placed.dtype == torch.bfloat16
    assert placed.generate(ids, max_new_tokens=3).shape == (1, 15)


def test_gradient_checkpointing_gives_the_same_gradients():
    ids, grads = _ids(2, 18), []
    for checkpointed in (False, True):
        model = make_model().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        out = model(ids, labels=ids, index_loss=True)
        (out.loss + 0.1 * out.index_loss).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads[0].values())
    torch.testing.assert_close(grads[0], grads[1])


def test_the_index_learns_from_attention_and_nothing_else_does():
    model, ids = make_model(), _ids(2, 18)
    model(ids, index_loss=True).index_loss.backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learns == {"model.indexer.q_proj.weight", "model.indexer.k_proj.weight"}
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    learns = {name for name, p in model.named_parameters() if p.grad is None}
    assert learns == {"model.indexer.q_proj.weight", "model.indexer.k_proj.weight"}


@torch.no_grad()
def test_index_loss_is_the_divergence_from_mean_dense_attention():
    model, ids = make_model(index_topk=4), _ids(1, 9)
    attended = []

    def keep(module, inputs):
        q = module.q_norm(module.q_proj(inputs[0]).view(1, 9, 4, 8)).transpose(1, 2)
        logits = q @ inputs[1].repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
        attended.append(logits.masked_fill(~seen(9, 9, None, q.device), -torch.inf).softmax(-1))

    for layer in model.model.layers[2:]:
        layer.self_attn.register_forward_pre_hook(keep)
    out = model(ids, index_loss=True, output_hidden_states=True)
    p = torch.cat(attended, 1).mean(1)[0]
    h = model.model.memory_norm(out.hidden_states[2])[0]
    query, key = model.model.indexer.q_proj(h), model.model.indexer.k_proj(h)
    losses, covered = [], []
    for t in range(9):
        index = torch.softmax(key[: t + 1] @ query[t] / 8**0.5, 0)
        losses.append((p[t, : t + 1] * (p[t, : t + 1] / index).log()).sum())
        covered.append(p[t, index.topk(min(4, t + 1)).indices].sum())
    assert out.index_loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert out.index_coverage.item() == pytest.approx(torch.stack(covered).mean().item(), rel=1e-5)


@pytest.mark.parametrize("block", [1, 4, 7])
def test_blocks_of_queries_are_all_queries(block, monkeypatch):
    model, ids, found = make_model(), _ids(2, 18), []
    mask = torch.ones(2, 18, dtype=torch.long)
    mask[1, :3] = 0
    for size in (18, block):
        monkeypatch.setattr(attention, "BLOCK", size)
        model.zero_grad()
        out = model(ids, attention_mask=mask, index_loss=True)
        logits = out.logits[mask.bool()]
        (logits.square().mean() + out.index_loss).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        found.append((logits, out.index_loss, out.index_coverage, grads))
    torch.testing.assert_close(*found)


def test_ties_go_to_the_lower_token_and_nan_ranks_last():
    scores = torch.tensor([[1.0, 3.0, torch.nan, 3.0, 3.0, 0.0]])
    held = torch.ones(1, 6, dtype=torch.bool)
    assert largest(scores, held, 2).tolist() == [[False, True, False, True, False, False]]
    assert largest(scores, held, 5).tolist() == [[True, True, False, True, True, True]]
    held[0, 1] = False
    assert largest(scores, held, 5).tolist() == held.tolist()


@pytest.mark.parametrize(
    "queries, tokens", [(1, 3), (1, 30), (4, 30), (30, 30), (17, 30), (31, 31)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_chunks_of_a_window_are_the_window(queries, tokens, padded):
    q = torch.randn(2, 4, queries, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, tokens, 8, dtype=torch.float64)
    valid = torch.arange(tokens) >= torch.tensor([[0], [2]]) if padded else None
    out = Window(queries, tokens, 5, valid, q.device)(q, k, v)
    mask = seen(queries, tokens, valid, q.device)
    mask = mask & torch.ones(queries, tokens, dtype=torch.bool).triu(tokens - queries - 4)
    logits = q @ k.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
    wanted = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"index_topk": 0}, "index_topk must be an integer of 1 or more, got 0"),
        ({"num_hidden_layers": 5}, "num_hidden_layers must be even, .* got 5"),
        ({"sliding_window": 0}, "sliding_window must be an integer of 1 or more, got 0"),
        ({"mode": "dense"}, "mode must be one of clsa, yoco, transformer, got 'dense'"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads, got 4 and 3"),
        ({"head_dim": 7}, "head_dim must be even for rotary positions, got 7"),
        ({"rope_theta": "x"}, "rope_theta must be a number greater than 0, got 'x'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number greater than 0, got nan"),
        ({"initializer_range": -1}, "initializer_range must be a number greater than 0, got -1"),
    ],
)
def test_shapes_that_no_model_has_are_refused(changes, message):
    with pytest.raises(ModelConfigError, match=message):
        make_config(**changes)


@pytest.mark.parametrize("make", [ClsaForCausalLM, ClsaModel, ClsaCache])
def test_configurations_of_other_models_are_refused(make):
    with pytest.raises(ArgumentError, match="config must be a ClsaConfig, got LlamaConfig"):
        make(LlamaConfig())


def test_checkpoints_of_other_models_are_refused(tmp_path):
    shape = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "llama")
    with pytest.raises(ModelConfigError, match="'llama' has no weights of a 'clsa' model"):
        ClsaForCausalLM.from_pretrained(tmp_path / "llama")
    make_model(mode="yoco").save_pretrained(tmp_path / "yoco")
    with pytest.raises(ModelConfigError, match="mode 'yoco' has not the weights of mode 'clsa'"):
        ClsaForCausalLM.from_pretrained(tmp_path / "yoco", mode="clsa")


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("clsa", "ClsaConfig selects the tokens that it reads by itself;"),
        ("yoco", "'yoco' attends by code of its own to keys and values that its layers share;"),
        ("transformer", "'transformer' attends without the attention interface of Transformers;"),
    ],
)
def test_delta_is_refused_with_what_is_true_of_the_mode(mode, reason):
    model = make_model(mode=mode)
    with pytest.raises(UnsupportedModelError, match=reason) as refused:
        dd.enable(model)
    assert "without DELTA" in str(refused.value) and "\n" not in str(refused.value)
    # What DELTA would take the place of; no mode has it, whatever else is said.
    assert attention_modules(model) == {}
    shared = [part for part in model.modules() if isinstance(part, ClsaSharedKV)]
    assert len(shared) == (mode != "transformer")


def test_what_a_model_cannot_do_is_refused():
    model, ids = make_model(max_position_embeddings=16), _ids(1, 17)
    with pytest.raises(ArgumentError, match="the model's 16 positions, got 17 tokens"):
        model(ids)
    with pytest.raises(ArgumentError, match="the model's 16 positions, got 20 tokens"):
        model.generate(ids[:, :10], max_new_tokens=10)
    for forward in (model, model.model):
        with pytest.raises(ArgumentError, match="gives no attention weights"):
            forward(ids[:, :4], output_attentions=True)
    with pytest.raises(ArgumentError, match=r"attention_mask must be \[1, 4\]"):
        model(ids[:, :4], attention_mask=torch.ones(1, 3))
    with pytest.raises(UnsupportedCacheError, match="keeps its tokens in a ClsaCache"):
        model.generate(ids[:, :4], max_new_tokens=2, cache_implementation="quantized")
    with pytest.raises(ArgumentError, match="mode 'yoco' has no index"):
        make_model(mode="yoco")(ids[:, :4], index_loss=True)
