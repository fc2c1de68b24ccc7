"""Rows at once give what decoding them one after the other gives."""

import pytest
import torch
from shared_kv_models import shared_kv_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MambaConfig,
    MambaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import deltadecode as dd
from deltadecode.errors import EvaluationError, PolicyError
from deltadecode.lab.policies import POLICIES, Layout, make_policy
from deltadecode.lab.policies.delta import Delta
from deltadecode.lab.rows import RowsText, refusal
from deltadecode.lab.rows import text as rows_text

KINDS = {"f": "full_attention", "s": "sliding_attention"}
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.4,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
HYBRID = {"layer_types": [KINDS[kind] for kind in "fsffsff"], "sliding_window": 12}

EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, HYBRID),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, HYBRID),  # soft-caps
    "gptoss": (GptOssConfig, GptOssForCausalLM, {**HYBRID, **EXPERTS}),  # sinks
}
# Pages of 4 tokens, 5 of them; layers 2 and 5 select for those behind them.
PLAN = "page_size=4:recent_pages=1:sink_pages=1:dense_layers=0+1:delta_layers=2+5"
BUDGET = 20
SPECS = [
    "full",
    f"delta:{PLAN}",
    f"delta-variant:{PLAN}:heads=mean",
    f"delta-variant:{PLAN}:heads=kv:accumulate=0.5",
    f"delta-variant:{PLAN}:per_layer=1",
    "oracle:page_size=4",
    "quest:page_size=4:dense=1",
    "quest-kv:page_size=4:dense=1",
    "streaming",
    "random:page_size=4",
    "tidal:layers=2+5",
    "tidal-kv:layers=2+5:recent=2:sinks=1",
    "kascade:layers=2+5",
    "omnikv:layers=2+5:wait=0",
    "lessismore:layers=2+5",
]
ROWS = 11  # more than two pages


def make_model(family):
    if family == "gemma4":
        return shared_kv_model("gemma4").double()
    config, kind, changes = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config(**{**SMALL, **changes})).eval().double()
    if family == "gptoss":
        model.set_experts_implementation("eager")  # the others take no float64
    return model


def text_of(context, rows=ROWS):
    return torch.randint(2, 61, (context + rows + 1,), generator=torch.Generator().manual_seed(1))


class Forced(LogitsProcessor):
    def __init__(self, targets):
        self.targets, self.step = targets, 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.targets[self.step]] = 0.0
        self.step += 1
        return forced


def step_by_step(model, policy, ids, context):
    """Log-probabilities [R, V] of teacher-forced generation, and what it read."""
    cache = {} if policy.name == "delta" else {"past_key_values": dd.DeltaCache(model.config)}
    rows = len(ids) - context - 1
    with policy.decoding(model):
        out = model.generate(
            ids[None, :context], max_new_tokens=rows + 1, do_sample=False, output_logits=True,
            return_dict_in_generate=True, logits_processor=[Forced(ids[context:])], **cache,
        )  # fmt: skip
    log_probs = torch.cat(out.logits[1:]).float().log_softmax(dim=1)
    return log_probs, policy.counts([context], rows)


@pytest.fixture(scope="module", params=[*FAMILIES, "gemma4"])
def model(request):
    model = make_model(request.param)
    model.family = request.param
    return model


@pytest.mark.parametrize("context", [7, 17, 41], ids=["within the budget", "grows past", "beyond"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.split(":")[0])
def test_rows_at_once_equal_step_by_step(model, spec, context):
    if model.family not in ("llama", "qwen3", "gemma3") and context != 17:
        pytest.skip("these families differ in their logits alone")
    if model.family == "gemma4":
        spec = spec.replace("0+1", "0+").replace("2+5", "1+3")
    ids = text_of(context)
    expected, reads = step_by_step(model, make_policy(spec, model, BUDGET), ids, context)
    policy = make_policy(spec, model, BUDGET)
    text = RowsText.prepare(model, ids, context)
    log_probs = text.log_probs(model, policy)
    torch.testing.assert_close(log_probs, expected, atol=2e-6, rtol=0)
    counted = policy.counts([context], ROWS)
    assert counted.read == pytest.approx(reads.read, abs=1e-4)
    assert counted.kept == pytest.approx(reads.kept, abs=1e-4)
    if context == 41 and not spec.startswith("full"):  # the policy did leave something out
        assert text.compare(log_probs).kl.max() > 1e-3


def test_every_policy_without_a_history_is_compared():
    compared = {spec.split(":")[0] for spec in SPECS}
    assert compared == {name for name, (kind, _) in POLICIES.items() if not kind.history}


def test_losses_are_those_of_the_text(model):
    ids = text_of(41)
    text = RowsText.prepare(model, ids, 41)
    log_probs = text.log_probs(model, make_policy("streaming", model, BUDGET))
    losses = text.compare(log_probs)
    assert text.targets.tolist() == ids[42:].tolist()
    assert text.lengths.tolist() == list(range(42, 42 + ROWS))
    rows = torch.arange(ROWS)
    torch.testing.assert_close(losses.nll, -log_probs[rows, ids[42:]])
    torch.testing.assert_close(losses.nll_full, -text.full[rows, ids[42:]])
    kl = (text.full.exp() * (text.full - log_probs)).sum(1)
    torch.testing.assert_close(losses.kl, kl, atol=1e-6, rtol=1e-5)
    assert losses.same.tolist() == (log_probs.argmax(1) == text.full.argmax(1)).tolist()
    plain = model(ids[None, :-1]).logits[0, 41:].float().log_softmax(dim=1)
    torch.testing.assert_close(text.full, plain, atol=2e-6, rtol=0)


def plans(model):
    layout = Layout.of(model)
    for budget, dense, delta, sink in [
        (20, (0, 1), (2, 5), 1), (20, (0, 1), (2, 5), 1), (20, (0, 1), (2,), 1),
        (24, (0, 1), (2, 5), 1), (20, (), (0, 3), 0), (20, (0, 1, 2), (3,), 1),
        (20, (0, 1), (2, 5), 1),
    ]:  # fmt: skip
        cfg = dd.DeltaConfig(
            page_size=4, budget_pages=5, recent_pages=1, sink_pages=sink, dense_layers=dense,
            delta_layers=delta,
        )  # fmt: skip
        layers = model.config.num_hidden_layers
        yield Delta(layout, budget, cfg, cfg.layer_plan(layers, layout.layers))


@pytest.mark.parametrize("memory", [2**20, 6000, 0])
def test_plans_that_begin_alike_share_their_first_layers(model, memory, monkeypatch):
    if model.family == "gemma4":
        pytest.skip("passes of layers that share keys start at the first")
    ids = text_of(41)
    text = RowsText.prepare(model, ids, 41, memory=memory)
    starts = []
    original = text._pass

    def noted(model, work, start, *rest):
        starts.append(start)
        return original(model, work, start, *rest)

    monkeypatch.setattr(text, "_pass", noted)
    for policy in plans(model):
        fresh = RowsText.prepare(model, ids, 41).log_probs(model, policy)
        assert torch.equal(text.log_probs(model, policy), fresh)
        assert text._memory.used <= memory
    if memory == 2**20:
        layers = model.config.num_hidden_layers
        assert starts[1] == starts[-1] == layers
        assert starts[0] == 2 and starts[2] == 5 and starts[3] == 3


def test_the_model_is_as_before(model):
    before = dict(vars(model.model.layers[0]))
    attention = model.config._attn_implementation
    text = RowsText.prepare(model, text_of(41), 41)
    text.log_probs(model, make_policy("streaming", model, BUDGET))
    assert dict(vars(model.model.layers[0])) == before
    assert not any(rows_text.NAME in vars(module) for module in model.modules())
    assert model.config._attn_implementation == attention


def test_what_needs_the_steps_before_is_refused():
    model = make_model("llama")
    text = RowsText.prepare(model, text_of(41), 41)
    for spec in ("h2o", f"delta-variant:{PLAN}:refresh=2", "kascade:anchors=3"):
        policy = make_policy(spec, model, BUDGET)
        assert "step by step" in refusal(model, policy)
        with pytest.raises(PolicyError, match="needs the decode steps before"):
            text.log_probs(model, policy)


@pytest.mark.parametrize(
    ("length", "context", "message"),
    [(40, 0, "1 token before"), (41, 40, "1 behind"), (300, 200, "256 positions")],
)
def test_texts_that_do_not_fit_are_refused(length, context, message):
    with pytest.raises(EvaluationError, match=message):
        RowsText.prepare(make_model("llama"), text_of(0, length - 1), context)


def test_models_with_another_state_are_refused():
    config = MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = MambaForCausalLM(config)
    assert "step by step" in refusal(model)
