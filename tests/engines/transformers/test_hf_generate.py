"""The user's own ``generate``, in all its modes, with DELTA switched on."""

import copy
import string
from typing import Any

import pytest
import torch
from hf_slow_delta import NAME, Rules, slow_logits
from hf_tiny import HYBRID, VOCAB, generate, make_model, make_prompt, small_config, sources
from tokenizers import Tokenizer, decoders, models
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

import deltadecode as dd
from deltadecode.engines.transformers import layers
from deltadecode.engines.transformers.bind import find_hooks

PROMPT, STEPS = 23, 24


def enabled(family: str = "llama", **changes: Any) -> PreTrainedModel:
    model = make_model(family, "sdpa" if family != "gpt_oss" else "eager").double()
    dd.enable(model, small_config(family, **changes))
    return model


def rules(family: str = "llama") -> Rules:
    return Rules(page=4, budget=5, recent=2, sink=1, sparse=sources(family))


def slow(text: torch.Tensor, steps: Any, family: str = "llama") -> torch.Tensor:
    return slow_logits(make_model(family, NAME).double(), text, steps, rules(family)).float()


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def left_padded(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(lengths)
    tokens = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        tokens[row, longest - length :] = make_prompt(length, seed=row)[0]
        mask[row, longest - length :] = 1
    return tokens, mask


# Two equal rows, one that stays within the budget of 20 tokens at first, and one of a single token.
LENGTHS = (23, 9, 1, 23, 14)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_rule6_each_row_of_a_left_padded_batch_equals_running_alone(family: str) -> None:
    model = enabled(family)
    tokens, mask = left_padded(LENGTHS)
    batch = generate(model, tokens, STEPS, attention_mask=mask)
    for row, length in enumerate(LENGTHS):
        alone = generate(model, tokens[row : row + 1, -length:], STEPS)
        assert torch.equal(batch.sequences[row, -STEPS:], alone.sequences[0, -STEPS:])
        close(torch.stack(batch.logits)[:, row], torch.cat(alone.logits))


def test_rule6_rows_of_a_batch_have_budgets_of_their_own() -> None:
    model = enabled(budget_pages=4, budget_share=0.6)
    tokens, mask = left_padded(LENGTHS)
    batch = generate(model, tokens, STEPS, attention_mask=mask)
    for row, length in enumerate(LENGTHS):
        alone = generate(model, tokens[row : row + 1, -length:], STEPS)
        close(torch.stack(batch.logits)[:, row], torch.cat(alone.logits))


def test_a_batch_without_padding_equals_running_alone() -> None:
    model = enabled()
    prompts = make_prompt(PROMPT, rows=3)
    batch = generate(model, prompts, STEPS)
    for row in range(3):
        alone = generate(model, prompts[row : row + 1], STEPS)
        close(torch.stack(batch.logits)[:, row], torch.cat(alone.logits))


def test_rule6_a_padded_conversation_that_goes_on_has_gaps_and_equals_running_alone() -> None:
    model = enabled()
    first, second = (11, 23), (17, 5)
    tokens, mask = left_padded(first)
    one = generate(model, tokens, 8, attention_mask=mask)
    more, more_mask = left_padded(second)
    tokens = torch.cat([one.sequences, more], dim=1)
    mask = torch.cat([mask, torch.ones(2, 8, dtype=torch.long), more_mask], dim=1)
    assert (mask.diff(dim=1) == -1).any()  # a gap in the middle of a row
    batch = generate(model, tokens, STEPS, attention_mask=mask, past_key_values=one.past_key_values)
    for row in range(2):
        text = tokens[row][mask[row].bool()][None]
        cut = first[row]
        alone = generate(model, text[:, :cut], 8)
        assert torch.equal(alone.sequences[0], text[0, : cut + 8])
        alone = generate(model, text, STEPS, past_key_values=alone.past_key_values)
        close(torch.stack(batch.logits)[:, row], torch.cat(alone.logits))


@pytest.mark.parametrize("chunk", [1, 7, 11, 22, 64])
def test_rule1_prefill_by_chunks_equals_prefill_at_once(chunk: int) -> None:
    model = enabled()
    prompt = make_prompt(34)  # over the budget: 7 and 11 leave a last chunk of 6 and of 1
    whole = generate(model, prompt, 6)
    steps = dd.stats(model).steps
    parts = generate(model, prompt, 6, prefill_chunk_size=chunk)
    close(torch.cat(parts.logits), torch.cat(whole.logits))
    assert dd.stats(model).steps == 2 * steps == 10


def test_rule1_prefill_of_a_padded_batch_by_chunks() -> None:
    model = enabled()
    tokens, mask = left_padded((34, 25))
    whole = generate(model, tokens, 4, attention_mask=mask)
    parts = generate(model, tokens, 4, attention_mask=mask, prefill_chunk_size=11)
    close(torch.cat(parts.logits), torch.cat(whole.logits))


def test_going_on_from_the_returned_cache_equals_one_go() -> None:
    model = enabled()
    whole = generate(model, make_prompt(PROMPT), STEPS)
    for options in ({}, {"prefill_chunk_size": 4}):
        part = generate(model, make_prompt(PROMPT), 10)
        rest = generate(
            model, part.sequences, STEPS - 10, past_key_values=part.past_key_values, **options
        )
        assert rest.past_key_values is part.past_key_values
        close(torch.cat(part.logits + rest.logits), torch.cat(whole.logits))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("whole_text", [True, False])
def test_rule1_a_second_turn_is_prefilled_with_full_attention(
    family: str, whole_text: bool
) -> None:
    model = enabled(family)
    one = generate(model, make_prompt(PROMPT), 10)
    turn = make_prompt(6, seed=5)
    text = torch.cat([one.sequences, turn], dim=1)
    new = text if whole_text else text[:, one.past_key_values.get_seq_length() :]
    mask = torch.ones_like(text)
    two = generate(model, new, 12, past_key_values=one.past_key_values, attention_mask=mask)
    text = torch.cat([text, two.sequences[:, -12:-1]], dim=1)
    decoded = [*range(PROMPT, PROMPT + 9), *range(PROMPT + 16, PROMPT + 27)]
    expected = slow(text, decoded, family)
    close(torch.cat(one.logits), expected[PROMPT - 1 : PROMPT + 9])
    close(torch.cat(two.logits), expected[PROMPT + 15 :])


def test_beam_search_follows_each_beam_through_the_reordered_cache() -> None:
    model = enabled()
    prompt = make_prompt(PROMPT, rows=2)
    out = generate(model, prompt, 14, num_beams=3, length_penalty=0.0, output_scores=True)
    assert len(set(out.beam_indices[0].tolist())) > 1  # beams did change places
    for row in range(2):
        text = out.sequences[row : row + 1]
        logits = slow(text[:, :-1], range(PROMPT, text.shape[1] - 1))[PROMPT - 1 :]
        taken = logits.log_softmax(dim=1).gather(1, text[0, PROMPT:, None])
        close(taken.sum(), out.sequences_scores[row])


def test_beam_search_with_a_budget_for_all_pages_equals_stock() -> None:
    model = enabled(budget_pages=64)
    prompt = make_prompt(PROMPT, rows=2)
    ours = generate(model, prompt, 14, num_beams=3)
    dd.disable(model)
    assert torch.equal(ours.sequences, generate(model, prompt, 14, num_beams=3).sequences)


def test_sampling_draws_what_the_logits_say() -> None:
    model = enabled()
    torch.manual_seed(3)
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 3}
    out = generate(model, make_prompt(PROMPT), STEPS, **options)
    assert len({tuple(row.tolist()) for row in out.sequences}) == 3
    for row in range(3):
        text = out.sequences[row : row + 1, :-1]
        expected = slow(text, range(PROMPT, text.shape[1]))[PROMPT - 1 :]
        close(torch.stack(out.logits)[:, row], expected)
    torch.manual_seed(3)
    again = generate(model, make_prompt(PROMPT), STEPS, **options)
    assert torch.equal(again.sequences, out.sequences)


def test_two_runs_give_the_same_bits() -> None:
    model = enabled()
    runs = [generate(model, make_prompt(PROMPT), STEPS) for _ in range(2)]
    assert torch.equal(torch.cat(runs[0].logits), torch.cat(runs[1].logits))


class Listing(BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamers() -> None:
    model, streamer = enabled(), Listing()
    out = generate(model, make_prompt(PROMPT), STEPS, streamer=streamer)
    assert streamer.tokens == out.sequences[0].tolist()
    assert streamer.ended


def test_stop_strings_and_end_of_text() -> None:
    letters = string.ascii_letters + string.digits
    spelling = Tokenizer(models.BPE({letters[i]: i for i in range(VOCAB)}, merges=[]))
    spelling.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelling)
    model = enabled()
    free = generate(model, make_prompt(PROMPT), STEPS).sequences
    last = next(t for t in range(PROMPT + 8, 47) if free[0, t] not in free[0, PROMPT:t])
    ending = tokenizer.decode(free[0, last - 1 : last + 1])
    out = generate(model, make_prompt(PROMPT), STEPS, stop_strings=[ending], tokenizer=tokenizer)
    assert torch.equal(out.sequences, free[:, : last + 1])
    out = generate(model, make_prompt(PROMPT), STEPS, eos_token_id=free[0, last].item())
    assert torch.equal(out.sequences, free[:, : last + 1])


def test_embeddings_as_input() -> None:
    model = enabled()
    prompt = make_prompt(PROMPT)
    out = generate(model, None, STEPS, inputs_embeds=model.get_input_embeddings()(prompt))
    assert torch.equal(out.sequences, generate(model, prompt, STEPS).sequences[:, PROMPT:])


def test_without_a_cache_every_pass_is_full_attention() -> None:
    model = enabled()
    ours = generate(model, make_prompt(PROMPT), 8, use_cache=False)
    assert dd.stats(model).steps == 0
    dd.disable(model)
    close(torch.cat(ours.logits), torch.cat(generate(model, make_prompt(PROMPT), 8).logits))


def test_a_loop_over_forward_equals_generate() -> None:
    model = enabled()
    out = generate(model, make_prompt(PROMPT), 12)
    with torch.no_grad():
        step = model(make_prompt(PROMPT))  # makes its own cache
        logits = [step.logits[:, -1]]
        for token in out.sequences[0, PROMPT:-1]:
            step = model(token.view(1, 1), past_key_values=step.past_key_values)
            logits.append(step.logits[:, -1])
    assert isinstance(step.past_key_values, dd.DeltaCache)
    close(torch.cat(logits).float(), torch.cat(out.logits))


def test_the_cache_can_be_copied_to_try_several_continuations() -> None:
    model = enabled()
    with torch.no_grad():
        cache = model(make_prompt(PROMPT)).past_key_values
        for _ in range(2):
            twin = copy.deepcopy(cache)
            logits = [
                model(torch.full((1, 1), token), past_key_values=twin).logits for token in (3, 4, 5)
            ]
    text = torch.cat([make_prompt(PROMPT), torch.tensor([[3, 4, 5]])], dim=1)
    close(torch.cat(logits)[:, 0].float(), slow(text, range(PROMPT, PROMPT + 3))[PROMPT:])
    assert cache.get_seq_length() == PROMPT


def test_masks_of_four_dimensions_at_a_decode_step() -> None:
    model = enabled()
    tokens, mask = left_padded((23, 14))
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    expected = generate(model, tokens, 2, attention_mask=mask)
    token = expected.sequences[:, -2:-1]
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    shown = mask.bool()[:, None, None]
    hidden = torch.zeros(shown.shape, dtype=torch.float64).masked_fill(~shown, -1e300)
    for four in (shown, hidden, shown.expand(2, 4, 1, 24)):
        with torch.no_grad():
            cache = model(tokens, attention_mask=mask[:, :-1], position_ids=places).past_key_values
            out = model(
                token,
                attention_mask=four,
                position_ids=places[:, -1:] + 1,
                past_key_values=cache,
            )
        close(out.logits[:, 0].float(), expected.logits[1])


def test_a_budget_below_the_length_from_which_the_cache_is_appended_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens, mask = left_padded((23, 34))
    expected = generate(enabled(), tokens, STEPS, attention_mask=mask)
    monkeypatch.setattr(layers, "_SHORT", 50)  # passed on the way
    got = generate(enabled(), tokens, STEPS, attention_mask=mask)
    close(torch.cat(got.logits), torch.cat(expected.logits))


def test_nothing_behind_the_last_token_is_ever_read(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(enabled(), make_prompt(PROMPT), STEPS)
    stock = layers._moved

    def poisoned(stored: torch.Tensor, capacity: int) -> torch.Tensor:
        buffer = stock(stored, capacity)
        buffer[:, :, stored.shape[2] :] = float("nan")
        return buffer

    monkeypatch.setattr(layers, "_moved", poisoned)
    got = generate(enabled(), make_prompt(PROMPT), STEPS)
    assert torch.equal(torch.cat(got.logits), torch.cat(expected.logits))


@pytest.mark.parametrize("family", ["llama", *HYBRID])
def test_training_is_full_attention(family: str) -> None:
    attention = "sdpa" if family in ("llama", "gemma3") else "eager"
    tokens = make_prompt(40, rows=2)
    losses, gradients = [], []
    for delta in (False, True):
        model = make_model(family, attention).double().train()
        if delta:
            dd.enable(model, small_config(family))
        loss = model(tokens, labels=tokens, use_cache=delta).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.get_input_embeddings().weight.grad)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_one_token_without_a_past() -> None:
    model = enabled()
    with torch.no_grad():
        got = model(make_prompt(1), use_cache=False).logits
        dd.disable(model)
        close(got.float(), model(make_prompt(1), use_cache=False).logits.float())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_as_the_assistant_of_another_model(family: str) -> None:
    main, assistant = make_model("qwen2", "sdpa"), enabled(family).float()
    expected = generate(main, make_prompt(PROMPT), STEPS)
    got = generate(main, make_prompt(PROMPT), STEPS, assistant_model=assistant)
    assert torch.equal(got.sequences, expected.sequences)
    assert dd.stats(assistant).steps > 0


def test_a_stock_cache_works_where_no_hook_could_be_set() -> None:
    # Roles on the modules and no hook on their model: no cache of ours, but the same results.
    expected = generate(enabled(), make_prompt(PROMPT), STEPS)
    model = enabled()
    for part, key, _ in list(find_hooks(model)):
        del part._forward_pre_hooks[key], part._forward_pre_hooks_with_kwargs[key]
    got = generate(model, make_prompt(PROMPT), STEPS)
    assert type(got.past_key_values) is DynamicCache
    close(torch.cat(got.logits), torch.cat(expected.logits))
