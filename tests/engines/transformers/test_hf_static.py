"""A static cache gives what the dynamic one gives, in one graph that is never traced again."""

from typing import Any

import pytest
import torch
from hf_tiny import generate, make_model, make_prompt, small_config, stock_name
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, PreTrainedModel, StaticCache

import deltadecode as dd
from deltadecode import DeltaStaticCache, UnsupportedCacheError
from deltadecode.engines.transformers import static as static_module

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_oss"]
STEPS = 14
LENGTHS = (23, 34, 9)


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> None:
    torch._dynamo.reset()


def enabled(family: str = "llama", **changes: Any) -> PreTrainedModel:
    model = make_model(family, stock_name(family)).double()
    dd.enable(model, small_config(family, **changes))
    return model


def left_padded(lengths: tuple[int, ...] = LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(lengths)
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
    return make_prompt(longest, len(lengths)) * mask, mask


def close(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(expected.logits), rtol=1e-5, atol=1e-4
    )


def compiling(**options: Any) -> CompileConfig:
    """What makes ``generate`` compile on a CPU, too."""
    config = CompileConfig(backend="aot_eager", mode="default", **options)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_equals_the_dynamic_cache(family: str) -> None:
    model = enabled(family)
    tokens, mask = left_padded()
    expected = generate(model, tokens, STEPS, attention_mask=mask)
    counts = dd.stats(model).per_layer, dd.stats(model).steps
    assert dd.stats(model).attended_fraction < 0.9
    dd.stats(model).reset()
    got = generate(model, tokens, STEPS, attention_mask=mask, cache_implementation="static")
    assert isinstance(got.past_key_values, DeltaStaticCache)
    close(got, expected)
    assert (dd.stats(model).per_layer, dd.stats(model).steps) == counts


@pytest.mark.parametrize("compiled", [False, True])
def test_a_budget_that_grows_with_each_row(compiled: bool) -> None:
    """Rows of a batch on both sides of where the share is more than K."""
    model = enabled(budget_pages=4, budget_share=0.6)
    tokens, mask = left_padded()
    expected = generate(model, tokens, STEPS, attention_mask=mask)
    counts = dd.stats(model).per_layer, dd.stats(model).steps
    dd.stats(model).reset()
    options: dict[str, Any] = {"compile_config": compiling()} if compiled else {}
    got = generate(
        model, tokens, STEPS, attention_mask=mask, cache_implementation="static", **options
    )
    close(got, expected)
    assert (dd.stats(model).per_layer, dd.stats(model).steps) == counts


@pytest.mark.parametrize(
    ("family", "recent"), [("llama", 0), ("llama", 2), ("gemma2", 2), ("gpt_oss", 2)]
)
def test_a_single_prompt_from_below_the_budget_on(family: str, recent: int) -> None:
    model = enabled(family, recent_pages=recent)
    for length in (1, 2, 13, 40):
        dd.stats(model).reset()
        expected = generate(model, make_prompt(length), STEPS)
        counts = dd.stats(model).per_layer, dd.stats(model).steps
        dd.stats(model).reset()
        got = generate(model, make_prompt(length), STEPS, cache_implementation="static")
        close(got, expected)
        assert (dd.stats(model).per_layer, dd.stats(model).steps) == counts


# Not Gemma-2, whose stock attention knows no float64 mask.
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma2"])
def test_a_budget_for_everything_equals_the_stock_model(family: str) -> None:
    tokens, mask = left_padded()
    model = make_model(family, stock_name(family)).double()
    expected = generate(model, tokens, STEPS, attention_mask=mask)
    dd.enable(model, small_config(family, budget_pages=12))
    got = generate(model, tokens, STEPS, attention_mask=mask, cache_implementation="static")
    close(got, expected)
    assert dd.stats(model).attended_fraction == 1.0


# The experts of gpt-oss break the graph in every layer, so that a step spans many graphs.
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_generate_compiles_its_decode_steps(family: str) -> None:
    model = enabled(family)
    tokens, mask = left_padded()
    expected = generate(model, tokens, STEPS, attention_mask=mask)
    counts = dd.stats(model).per_layer
    dd.stats(model).reset()
    options = {"cache_implementation": "static", "attention_mask": mask}
    options["compile_config"] = compiling(fullgraph=family != "gpt_oss")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    close(generate(model, tokens, STEPS, **options), expected)
    assert dd.stats(model).per_layer == counts
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    # Another prompt, as the cache of the same size holds it, finds everything traced.
    generate(model, tokens[:, 1:], STEPS, **{**options, "attention_mask": mask[:, 1:]})
    again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    if family == "llama":
        assert graphs == again == 1
    else:  # Transformers counts the tokens of a sliding window in Python
        assert 0 < graphs <= (3 if family == "gemma3" else 60)


def test_chunks_of_a_prompt_are_prefill_down_to_the_last_token() -> None:
    model = enabled()
    tokens = make_prompt(37)
    expected = generate(model, tokens, STEPS)
    steps = dd.stats(model).steps
    for compiled in (False, True):
        dd.stats(model).reset()
        options: dict[str, Any] = {"compile_config": compiling()} if compiled else {}
        got = generate(
            model, tokens, STEPS, cache_implementation="static", prefill_chunk_size=12, **options
        )
        close(got, expected)
        assert dd.stats(model).steps == steps


def test_a_loop_over_a_compiled_forward_traces_once() -> None:
    model = enabled().float()
    tokens, mask = left_padded()
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    expected = generate(model, tokens, STEPS, attention_mask=mask)
    counts = dd.stats(model).per_layer
    dd.stats(model).reset()

    counter = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model.forward, fullgraph=True, backend=counter)
    cache = DeltaStaticCache(model.config, max_cache_len=50)
    whole = torch.cat([mask, torch.ones(len(mask), 50 - mask.shape[1], dtype=torch.long)], dim=1)
    with torch.no_grad():
        out = model(tokens, attention_mask=mask, position_ids=places, past_key_values=cache)
        logits = [out.logits[:, -1]]
        for step in range(1, STEPS):
            token = logits[-1].argmax(dim=1, keepdim=True)
            out = forward(
                input_ids=token,
                attention_mask=whole,
                position_ids=places[:, -1:] + step,
                past_key_values=cache,
            )
            logits.append(out.logits[:, -1])
    torch.testing.assert_close(
        torch.stack(logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-3
    )
    assert counter.frame_count == 1
    assert dd.stats(model).per_layer == counts


def test_a_forward_that_compiles_the_prompt_too() -> None:
    model = enabled()
    tokens = make_prompt(30)
    expected = generate(model, tokens, 6)
    counts = dd.stats(model).per_layer
    dd.stats(model).reset()
    forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    cache = DeltaStaticCache(model.config, max_cache_len=40)
    logits = []
    with torch.no_grad():
        for _ in range(6):
            out = forward(input_ids=tokens, past_key_values=cache)
            logits.append(out.logits[:, -1].float())
            tokens = logits[-1].argmax(dim=1, keepdim=True)
    torch.testing.assert_close(torch.stack(logits), torch.stack(expected.logits))
    assert dd.stats(model).per_layer == counts


def test_nothing_but_the_tokens_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = enabled()
    tokens, mask = left_padded()
    expected = generate(model, tokens, STEPS, attention_mask=mask, cache_implementation="static")
    stock = static_module.static_attention

    def poisoned(state: Any, layer: int, query: Any, key: Any, value: Any, mask: Any, *more: Any):
        for states in (key, value):
            states.masked_fill_(~mask[:, 0, 0][:, None, :, None], float("nan"))
        return stock(state, layer, query, key, value, mask, *more)

    from deltadecode.engines.transformers import attention

    monkeypatch.setattr(attention, "static_attention", poisoned)
    got = generate(model, tokens, STEPS, attention_mask=mask, cache_implementation="static")
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))


def test_generate_goes_on_from_its_cache() -> None:
    model = enabled()
    tokens, mask = left_padded()
    expected = generate(model, tokens, 20, attention_mask=mask)
    cache = DeltaStaticCache(model.config, max_cache_len=60)
    first = generate(model, tokens, 8, attention_mask=mask, past_key_values=cache)
    assert first.past_key_values is cache
    mask = torch.cat([mask, torch.ones(len(mask), 8, dtype=torch.long)], dim=1)
    got = generate(model, first.sequences, 12, attention_mask=mask, past_key_values=cache)
    assert torch.equal(got.sequences, expected.sequences)


def test_beam_search() -> None:
    model = enabled()
    options = {"num_beams": 3, "max_new_tokens": 10, "do_sample": False}
    expected = model.generate(make_prompt(30), **options)
    got = model.generate(make_prompt(30), cache_implementation="static", **options)
    assert torch.equal(got, expected)


def test_prefixes_of_the_cache_of_another_plan() -> None:
    model = enabled()
    cache = DeltaStaticCache(model.config, max_cache_len=60, page_size=4)
    generate(model, make_prompt(30), 4, past_key_values=cache)
    dd.enable(model, small_config(page_size=8))
    refused(
        UnsupportedCacheError,
        "pages of 8",
        "up to 4",
        call=lambda: generate(model, make_prompt(40), 4, past_key_values=cache),
    )


def refused(error: type[Exception], *parts: str, call: Any) -> None:
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("size", ["64", None, 64.0, True])
def test_sizes_that_are_no_ints(size: Any) -> None:
    config = enabled().config
    for name in ("max_cache_len", "page_size"):
        sizes = {"max_cache_len": 64, name: size}
        refused(
            dd.ArgumentError,
            f"{name} must be an int",
            repr(size),
            call=lambda sizes=sizes: DeltaStaticCache(config, **sizes),
        )


def test_a_stock_static_cache_and_one_off_the_device() -> None:
    model = enabled()
    stock = StaticCache(model.config, max_cache_len=60)
    refused(
        UnsupportedCacheError,
        "got a StaticCache",
        "DeltaStaticCache",
        call=lambda: generate(model, make_prompt(5), 4, past_key_values=stock),
    )
    refused(
        UnsupportedCacheError,
        "'offloaded_static'",
        "'static'",
        call=lambda: generate(model, make_prompt(5), 4, cache_implementation="offloaded_static"),
    )


def test_gaps_between_the_tokens_of_a_row() -> None:
    model = enabled()
    tokens, mask = left_padded((9, 12))
    mask[1, 7] = 0
    parts = (ValueError, "padding in slot 7 of row 1", "default cache")
    options = {"attention_mask": mask, "cache_implementation": "static"}
    refused(*parts, call=lambda: generate(model, tokens, 4, **options))
    cache = DeltaStaticCache(model.config, max_cache_len=20)
    with torch.no_grad():
        refused(*parts, call=lambda: model(tokens, attention_mask=mask, past_key_values=cache))
        # Zeros behind the tokens, for those to come, are no gap.
        mask = torch.cat([torch.ones(2, 12), torch.zeros(2, 8)], dim=1).long()
        model(tokens, attention_mask=mask, past_key_values=cache)
    assert int(cache.get_seq_length()) == 12


def test_more_tokens_than_there_is_room_for() -> None:
    model = enabled()
    cache = DeltaStaticCache(model.config, max_cache_len=20)
    say = (ValueError, "room for 20 tokens")
    refused(
        *say, "got 21", call=lambda: generate(model, make_prompt(12), 10, past_key_values=cache)
    )
    generate(model, make_prompt(12), 9, past_key_values=cache)
    with torch.no_grad():
        refused(*say, "got 21", call=lambda: model(make_prompt(1), past_key_values=cache))
        forward = torch.compile(model.forward, backend="aot_eager")
        with pytest.raises(IndexError):
            forward(input_ids=make_prompt(1), past_key_values=cache)


def test_a_mask_that_is_none_of_a_static_cache() -> None:
    model = enabled()
    cache = DeltaStaticCache(model.config, max_cache_len=20)
    with torch.no_grad():
        model(make_prompt(12), past_key_values=cache)
        bias = torch.zeros(1, 1, 1, 128, dtype=torch.float64)
        refused(
            ValueError,
            "torch.bool mask [rows, 1, 1, 128]",
            "torch.float64",
            call=lambda: model(make_prompt(1), attention_mask=bias, past_key_values=cache),
        )
