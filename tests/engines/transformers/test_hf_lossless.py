"""Lossless mode: sparse steps draft, full attention verifies, and nothing is lost (R12 to R14)."""

import copy
import string
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_tiny import VOCAB, generate, make_model, make_prompt, small_config
from scipy.stats import chisquare
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.generation.streamers import BaseStreamer

import deltadecode as dd
from deltadecode.engines.transformers import acceptance
from deltadecode.lab.tasks import make_problem, model_path
from deltadecode.lab.tasks.text import Text

PROMPT, STEPS = 23, 24
# Two equal rows, one that stays within the budget of 20 tokens at first, and one of a single token.
LENGTHS = (23, 9, 1, 23, 34)
FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "gpt_oss"]


def models(family: str = "llama", draft_tokens: int | None = 4, **changes: Any) -> tuple[Any, Any]:
    """A model with full attention, and the same one in lossless mode."""
    stock = make_model(family, "eager" if family in ("gemma2", "gpt_oss") else "sdpa").double()
    ours = copy.deepcopy(stock)
    if family == "gemma2":  # stock attention gives NaN for its padded rows; R3 says this is full
        dd.enable(stock, small_config(family, budget_pages=999))
    dd.enable(ours, small_config(family, **changes), lossless=True, draft_tokens=draft_tokens)
    return stock, ours


def left_padded(lengths: tuple[int, ...] = LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        tokens[row, -length:] = make_prompt(length, seed=row)[0]
        mask[row, -length:] = 1
    return tokens, mask


def same(ours: Any, stock: Any) -> None:
    assert torch.equal(ours.sequences, stock.sequences)
    expected = torch.stack(stock.logits)
    torch.testing.assert_close(torch.stack(ours.logits), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draft_tokens", [1, 4, 16])
def test_rule14_greedy_output_is_that_of_full_attention(family: str, draft_tokens: int) -> None:
    stock, ours = models(family, draft_tokens)
    tokens, mask = left_padded()
    for options in ({}, {"attention_mask": mask}):
        inputs = tokens if options else make_prompt(PROMPT)
        same(generate(ours, inputs, STEPS, **options), generate(stock, inputs, STEPS, **options))
    counts = dd.stats(ours)
    assert 0 < counts.accepted < counts.verified <= counts.drafted  # some drafts were wrong


def real(folder: Any, prompts: list[torch.Tensor], steps: int, cfg: dd.DeltaConfig) -> Any:
    """Greedy texts of a left-padded batch in float32: in lossless mode, and with full attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    width = max(map(len, prompts))
    tokens = torch.stack([F.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    options = {"attention_mask": mask, "max_new_tokens": steps, "do_sample": False}
    expected = model.generate(tokens, **options)
    dd.enable(model, cfg, lossless=True, draft_tokens=4)
    got = model.generate(tokens, **options)
    counts = dd.stats(model)
    assert counts.drafted > 0 and counts.acceptance > 0.5
    return got, expected


def test_rule14_the_embedded_model_writes_what_full_attention_writes() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    prompts = []
    for seed, more in enumerate((40, 0, 111, 75)):  # within their solutions, at unlike lengths
        problem = make_problem(seed, steps=12)
        ids = tokenizer(problem.prompt + problem.solution, return_tensors="pt").input_ids[0]
        prompts.append(ids[: 300 + more])
    cfg = dd.DeltaConfig(page_size=8, budget_pages=12, recent_pages=3, delta_layers=(2, 9))
    got, expected = real(model_path(), prompts, 32, cfg)
    assert torch.equal(got, expected)


def test_rule14_smollm2_writes_what_full_attention_writes(smollm2: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    pieces = Text(source="stdlib-docs", context=300, tokens=32).pieces(tokenizer, range(2))
    prompts = [torch.tensor(piece[: 300 - 70 * row]) for row, piece in enumerate(pieces)]
    cfg = dd.DeltaConfig(budget_pages=8, recent_pages=3, delta_layers=(2, 9))
    got, expected = real(smollm2, prompts, 32, cfg)
    assert torch.equal(got, expected)


def test_rule12_within_the_budget_nothing_is_drafted() -> None:
    stock, ours = models(budget_pages=64)
    same(generate(ours, make_prompt(PROMPT), STEPS), generate(stock, make_prompt(PROMPT), STEPS))
    counts = dd.stats(ours)
    assert (counts.drafted, counts.attended_fraction, counts.acceptance) == (0, 1.0, 1.0)
    assert counts.steps == STEPS - 1


def test_a_wrong_acceptance_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, ours = models()
    everything = torch.ones(1, dtype=torch.bool)
    monkeypatch.setattr(
        "deltadecode.engines.transformers.speculation.verify",
        lambda scores, drafts, probs: (drafts, everything),
    )
    got = generate(ours, make_prompt(PROMPT), STEPS)
    assert not torch.equal(got.sequences, generate(stock, make_prompt(PROMPT), STEPS).sequences)


def test_rule11_counts() -> None:
    stock, ours = models()
    out = generate(ours, make_prompt(PROMPT), STEPS)
    counts = dd.stats(ours)
    layers = ours.config.num_hidden_layers
    # What full attention would have read for the tokens that came, and for no draft.
    assert counts.full_tokens == layers * sum(range(PROMPT + 1, out.sequences.shape[1]))
    assert 0 < counts.accepted <= counts.verified <= counts.drafted
    assert {record.role for record in counts.per_layer} == {"delta"}
    del stock


def test_the_cache_goes_on_in_a_second_turn() -> None:
    stock, ours = models()
    tokens, mask = left_padded((23, 30))
    turn = torch.cat([make_prompt(5, seed=9), make_prompt(5, seed=8)])
    results = []
    for model in (ours, stock):
        one = generate(model, tokens, 10, attention_mask=mask)
        text = torch.cat([one.sequences, turn], dim=1)
        more = torch.cat([mask, torch.ones(2, 15, dtype=torch.long)], dim=1)
        options = {"past_key_values": one.past_key_values, "attention_mask": more}
        results.append(generate(model, text, 12, **options))
    same(*results)


class Listing(BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streamers_get_one_token_at_a_time() -> None:
    _, ours = models()
    streamer = Listing()
    out = generate(ours, make_prompt(PROMPT), STEPS, streamer=streamer)
    assert [len(piece) for piece in streamer.pieces] == [PROMPT] + STEPS * [1]
    given = [token for piece in streamer.pieces for token in piece]
    assert given == out.sequences[0].tolist()
    assert streamer.ended


def test_end_tokens_padding_and_processors_are_those_of_the_stock_loop() -> None:
    stock, ours = models()
    tokens, mask = left_padded()
    free = generate(stock, tokens, STEPS, attention_mask=mask).sequences
    for end in (free[0, -STEPS + 6].item(), free[3, -9].item(), free[4, -5].item()):
        for options in (
            {},
            {"repetition_penalty": 1.3, "min_new_tokens": 9},
            {"no_repeat_ngram_size": 2},
        ):
            options = {"eos_token_id": end, "attention_mask": mask, **options}
            got = generate(ours, tokens, STEPS, **options)
            expected = generate(stock, tokens, STEPS, **options)
            assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize("end", [False, True])
def test_stop_strings_and_streamers_of_a_batch_are_those_of_the_stock_loop(end: bool) -> None:
    stock, ours = models()
    tokens, mask = left_padded()
    letters = string.ascii_letters + string.digits
    spelling = Tokenizer(BPE({letters[i]: i for i in range(VOCAB)}, merges=[]))
    spelling.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelling)
    free = generate(stock, tokens, STEPS, attention_mask=mask).sequences
    ends = enumerate((40, 42, 37, 44, 50))  # of two tokens: of one verification, or of two
    stops = [tokenizer.decode(free[row, at : at + 2]) for row, at in ends]
    options = {"attention_mask": mask, "stop_strings": stops, "tokenizer": tokenizer}
    if end:  # rows that stopped are padded while the others go on
        options["eos_token_id"] = free[3, 44].item()
    results, streams = [], []
    for model in (ours, stock):
        streamer = Listing()
        results.append(generate(model, tokens, STEPS, streamer=streamer, **options).sequences)
        streams.append(streamer.pieces)
        assert streamer.ended
    assert torch.equal(*results)
    assert streams[0] == streams[1]
    assert max(LENGTHS) < results[0].shape[1] < free.shape[1]


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_it_stops_at_the_last_token_wanted(steps: int) -> None:
    stock, ours = models()
    same(generate(ours, make_prompt(40), steps), generate(stock, make_prompt(40), steps))


def test_embeddings_and_chunked_prompts() -> None:
    stock, ours = models()
    prompt = make_prompt(40)
    expected = generate(stock, prompt, STEPS).sequences
    got = generate(ours, None, STEPS, inputs_embeds=ours.get_input_embeddings()(prompt))
    assert torch.equal(got.sequences, expected[:, 40:])
    got = generate(ours, prompt, STEPS, prefill_chunk_size=7)
    assert torch.equal(got.sequences, expected)


def test_forward_outside_of_generate_is_full_attention() -> None:
    stock, ours = models()
    caches: list[Any] = [None, None]
    for token in [make_prompt(40), *make_prompt(6, seed=3).split(1, dim=1)]:
        logits = []
        for place, model in enumerate((stock, ours)):
            with torch.no_grad():
                out = model(token, past_key_values=caches[place])
            caches[place] = out.past_key_values
            logits.append(out.logits)
        torch.testing.assert_close(logits[1], logits[0], atol=1e-6, rtol=0)


def test_a_model_that_drops_weights_decodes_with_full_attention() -> None:
    model = make_model("llama", "sdpa", attention_dropout=0.2)
    dd.enable(model, small_config(), lossless=True)
    model.train()
    out = generate(model, make_prompt(40), STEPS)
    assert out.sequences.shape[1] == 40 + STEPS and dd.stats(model).drafted == 0


def test_rule13_a_sampled_token_is_distributed_as_the_targets() -> None:
    torch.manual_seed(5)
    draws, vocabulary = 20_000, 12
    target, draft = torch.randn(2, 1, vocabulary).mul(1.5).unbind()
    target[0, 3] = draft[0, 7] = -torch.inf  # as top-k and top-p leave them
    drafts, probs = acceptance.choose(draft.expand(draws, -1), True)
    tokens, accepted = acceptance.verify(target.expand(draws, -1), drafts, probs)
    assert torch.equal(tokens[accepted], drafts[accepted])
    check_distribution(tokens, target.softmax(dim=-1)[0])
    # The test itself: drafts that all stay are not distributed so.
    with pytest.raises(AssertionError):
        check_distribution(drafts, target.softmax(dim=-1)[0])


def test_drawing_without_a_look_at_the_weights_is_drawing() -> None:
    weights = torch.rand(50, 30).mul(torch.rand(50, 30) > 0.4)
    torch.manual_seed(3)
    expected = weights.multinomial(1)[:, 0]
    torch.manual_seed(3)
    assert torch.equal(acceptance.draw_unseen(weights), expected)


def check_distribution(tokens: torch.Tensor, probs: torch.Tensor) -> None:
    seen = tokens.bincount(minlength=len(probs)).double()
    probs = probs.double()
    assert not seen[probs == 0].any()
    likely = probs > 0
    expected = probs[likely] / probs[likely].sum() * len(tokens)
    assert chisquare(seen[likely].numpy(), expected.numpy()).pvalue > 0.01


SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 6, "top_p": 0.9}


def test_rule13_sampled_texts_are_distributed_as_full_attentions() -> None:
    stock, ours = models(draft_tokens=2)
    prompt, rows, steps = make_prompt(40), 20_000 // 8, 5
    torch.manual_seed(1)
    # The third token behind the first: drafts of a first round, in rows that wait for each other.
    got = torch.cat(
        [
            ours.generate(prompt.expand(rows, -1), max_new_tokens=steps, **SAMPLING)[:, 40:]
            for _ in range(8)
        ]
    )
    counts = dd.stats(ours)
    assert 0 < counts.accepted < counts.verified
    check_distribution(got[:, 3], marginal(stock, prompt, 3))


def marginal(model: PreTrainedModel, prompt: torch.Tensor, place: int) -> torch.Tensor:
    """Exact distribution of the token at a place behind the prompt, over all texts before it."""
    texts, weights = prompt, torch.ones(1, dtype=torch.float64)
    options = {**SAMPLING, "return_dict_in_generate": True, "output_scores": True}
    for _ in range(place):
        probs = next_probs(model, texts, options)
        rows, tokens = probs.nonzero(as_tuple=True)
        texts = torch.cat([texts[rows], tokens[:, None]], dim=1)
        weights = weights[rows] * probs[rows, tokens]
    return weights @ next_probs(model, texts, options)


def next_probs(model: PreTrainedModel, texts: torch.Tensor, options: Any) -> torch.Tensor:
    mask = torch.ones_like(texts)  # one of the tokens is the one for padding
    scores = model.generate(texts, attention_mask=mask, max_new_tokens=1, **options).scores[0]
    return scores.double().softmax(dim=-1)


def refused(message: str, call: Any) -> None:
    with pytest.raises(dd.DeltaDecodeError) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [0, 17, -1, True, 2.0])
def test_a_number_of_drafts_that_cannot_be(count: Any) -> None:
    model = make_model("llama", "sdpa")
    refused(
        "draft_tokens must be",
        lambda: dd.enable(model, small_config(), lossless=True, draft_tokens=count),
    )
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("flag", ["no", 1, None])
def test_lossless_is_a_flag(flag: Any) -> None:
    model = make_model("llama", "sdpa")
    refused("lossless must be True or False", lambda: dd.enable(model, lossless=flag))
    assert model.config._attn_implementation == "sdpa"


def test_drafts_without_lossless() -> None:
    model = make_model("llama", "sdpa")
    refused("needs lossless=True", lambda: dd.enable(model, small_config(), draft_tokens=3))


@pytest.mark.parametrize(
    "message, options",
    [
        ("beam_search", {"num_beams": 3}),
        ("assisted_generation", {"prompt_lookup_num_tokens": 3}),
        ("use_cache=False", {"use_cache": False}),
        ("guidance_scale", {"guidance_scale": 1.5}),
        ("output_hidden_states", {"output_hidden_states": True}),
        ("custom_generate", {"custom_generate": lambda *args, **kwargs: None}),
    ],
)
def test_what_cannot_be_drafted_is_refused(message: str, options: dict[str, Any]) -> None:
    _, ours = models()
    streamer = Listing()
    refused(message, lambda: generate(ours, make_prompt(9), 4, streamer=streamer, **options))
    assert not streamer.pieces


def test_an_assistant_is_refused() -> None:
    stock, ours = models()
    refused("no other assistant", lambda: generate(ours, make_prompt(9), 4, assistant_model=stock))


def test_copies_stay_lossless_and_enabling_again_ends_it() -> None:
    stock, ours = models()
    twin = copy.deepcopy(ours)
    same(generate(twin, make_prompt(40), STEPS), generate(stock, make_prompt(40), STEPS))
    assert dd.stats(twin).drafted > 0
    dd.enable(twin, small_config())
    generate(twin, make_prompt(40), STEPS)
    assert dd.stats(twin).drafted == 0
    dd.disable(ours)
    same(generate(ours, make_prompt(40), STEPS), generate(stock, make_prompt(40), STEPS))


def test_as_the_assistant_of_another_model() -> None:
    main, (_, assistant) = make_model("qwen2", "sdpa"), models()
    expected = generate(main, make_prompt(PROMPT), STEPS)
    got = generate(main, make_prompt(PROMPT), STEPS, assistant_model=assistant.float())
    assert torch.equal(got.sequences, expected.sequences)
