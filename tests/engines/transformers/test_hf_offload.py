"""The cache of sparse layers on the host gives what ``DeltaCache`` gives, bit for bit.

Host and device are both the CPU here: the copies between them are those of ``Transfer``.
"""

from typing import Any

import offload_cases
import pytest
import torch
from hf_tiny import FAMILIES, make_model, make_prompt, small_config, sources, stock_name
from transformers import GenerationConfig

import deltadecode as dd
from deltadecode.engines.transformers import offload
from deltadecode.engines.transformers.offload_host import Transfer
from deltadecode.engines.transformers.offload_layer import OffloadedLayer

SHARE = {"budget_share": 0.4}
NO_RECENT = {"recent_pages": 0}


def enabled(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = make_model(family, stock_name(family)).to(dtype)
    dd.enable(model, small_config(family, **changes))
    return model


def caches(model: Any, **changes: Any) -> tuple[dd.DeltaOffloadedCache, dd.DeltaCache]:
    cfg = small_config(model.config.model_type.removesuffix("_text"), **changes)
    return dd.DeltaOffloadedCache(model.config, cfg, transfer=Transfer()), dd.DeltaCache(
        model.config
    )


def run(model: Any, prompt: torch.Tensor, cache: Any, steps: int = 30, **options: Any) -> Any:
    dd.stats(model).reset()
    out = model.generate(
        prompt, past_key_values=cache, max_new_tokens=steps, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits), dd.stats(model).per_layer


def assert_same(model: Any, pair: tuple[Any, Any], prompt: Any, *args: Any, **options: Any) -> Any:
    """Both caches give the same, and hold the same; gives the tokens."""
    ours, plain = (run(model, prompt, cache, *args, **options) for cache in pair)
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1])
    assert ours[2] == plain[2]
    for left, right in zip(pair[0].layers, pair[1].layers, strict=True):
        assert torch.equal(left.keys, right.keys)
        assert torch.equal(left.values, right.values)
        assert left.get_seq_length() == right.get_seq_length()
    return ours[0]


def sparse(cache: Any) -> list[OffloadedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, OffloadedLayer)]


def padded(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(lengths)
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
    return make_prompt(longest, len(lengths)) * mask, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model = enabled(family)
    pair = caches(model)
    assert_same(model, pair, make_prompt(41))
    assert len(sparse(pair[0])) == len(sources(family))
    assert all(layer.offloaded for layer in sparse(pair[0]))


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        (SHARE, torch.float32),
        (SHARE, torch.bfloat16),
        (NO_RECENT, torch.bfloat16),
        ({"sink_pages": 0, "page_size": 3}, torch.float64),
        ({"page_size": 1, "budget_pages": 11}, torch.float16),
    ],
)
def test_plans(changes: dict[str, Any], dtype: torch.dtype) -> None:
    model = enabled(dtype=dtype, **changes)
    assert_same(model, caches(model, **changes), make_prompt(41, rows=2), 40)


@pytest.mark.parametrize("tokens", [1, 19, 20])
def test_a_short_prompt_moves_out_when_it_leaves_the_budget(tokens: int) -> None:
    model = enabled()
    pair = caches(model)
    prompt = assert_same(model, pair, make_prompt(tokens, rows=2), 21 - tokens)
    assert not any(layer.offloaded for layer in sparse(pair[0]))
    assert_same(model, pair, prompt, 12)
    assert all(layer.offloaded for layer in sparse(pair[0]))


@pytest.mark.parametrize("changes", [{}, SHARE, NO_RECENT])
def test_padded_batches_some_rows_within_the_budget(changes: dict[str, Any]) -> None:
    model = enabled(**changes)
    tokens, mask = padded((41, 9, 26, 41, 9, 3))
    assert_same(model, caches(model, **changes), tokens, 30, attention_mask=mask)


def test_a_padded_conversation_that_goes_on_has_gaps() -> None:
    model = enabled()
    pair = caches(model)
    tokens, mask = padded((31, 12, 22))
    first = assert_same(model, pair, tokens, 10, attention_mask=mask)
    more, more_mask = padded((9, 4, 7))
    mask = torch.cat([mask, torch.ones(3, 10, dtype=torch.long), more_mask], dim=1)
    tokens = torch.cat([first, more], dim=1)
    second = assert_same(model, pair, tokens, 24, attention_mask=mask)
    mask = torch.cat([mask, torch.ones(3, 24, dtype=torch.long)], dim=1)
    assert_same(model, pair, second, 6, attention_mask=mask)


@pytest.mark.parametrize("removed", [1, 11, 51])
def test_cropped_and_continued(removed: int) -> None:
    model = enabled()
    pair = caches(model)
    tokens = assert_same(model, pair, make_prompt(41, rows=2), 31)
    for cache in pair:
        cache.crop(-removed)
    kept = tokens[:, : tokens.shape[1] - 1 - removed]
    assert all(layer.offloaded == (removed < 51) for layer in sparse(pair[0]))
    assert_same(model, pair, torch.cat([kept, make_prompt(2, rows=2, seed=5)], dim=1), 30)


def test_generate_makes_one_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(offload, "CudaTransfer", Transfer)
    # A CUDA build of PyTorch without a driver: the class's own offloaded cache cannot be made.
    monkeypatch.setattr(torch, "Stream", refuse)
    model = enabled()
    default, ours, configured = (
        run(model, make_prompt(41, rows=2), None, 12, **options)
        for options in (
            {},
            {"cache_implementation": "offloaded"},
            {"generation_config": GenerationConfig(cache_implementation="offloaded")},
        )
    )
    assert dd.stats(model).offload.steps == 11
    for got in (ours, configured):
        assert torch.equal(got[0], default[0])
        assert torch.equal(got[1], default[1])
        assert got[2] == default[2]


def test_chunked_prefill() -> None:
    model = enabled()
    for size in (7, 40):
        assert_same(model, caches(model), make_prompt(41, rows=2), 12, prefill_chunk_size=size)


def same_by(model: Any) -> Any:
    """What the cases of offload_cases.py call."""

    def same(pair: Any, tokens: Any, mask: Any, steps: int, **options: Any) -> Any:
        return assert_same(model, pair, tokens, steps, attention_mask=mask, **options)

    return same


def test_beam_search_and_several_sequences() -> None:
    model = enabled()
    offload_cases.beam_search(same_by(model), caches(model), *padded((41, 41)), 12)


# Beyond the budget of 20 tokens, and within it until the rows are chosen.
@pytest.mark.parametrize("lengths", [(31, 31, 31), (31, 12, 22), (9, 4, 7)])
@pytest.mark.parametrize("choice", offload_cases.CHOICES)
def test_other_rows_decode_on(choice: str, lengths: tuple[int, ...]) -> None:
    model = enabled()
    pair = caches(model)
    offload_cases.other_rows(same_by(model), pair, *padded(lengths), 8, choice)
    assert all(layer.offloaded for layer in sparse(pair[0]))


@pytest.mark.parametrize("twin_of", offload_cases.TWINS.values(), ids=offload_cases.TWINS)
def test_a_copy_goes_on_by_itself(twin_of: Any) -> None:
    model = enabled()
    same = same_by(model)
    offload_cases.a_copy_goes_on(same, caches(model), *padded((41, 41)), 12, twin_of)


def test_reset_and_used_again() -> None:
    model = enabled()
    pair = caches(model)
    assert_same(model, pair, make_prompt(41), 12)
    for cache in pair:
        cache.reset()
    assert pair[0].host_bytes == pair[0].get_seq_length() == 0
    assert_same(model, pair, make_prompt(30, rows=3, seed=2), 12)


def test_a_disabled_model_reads_the_whole_cache() -> None:
    model = enabled()
    pair = caches(model)
    tokens = assert_same(model, pair, make_prompt(41), 12)
    dd.disable(model)
    out = [model.generate(tokens, past_key_values=cache, max_new_tokens=5) for cache in pair]
    assert torch.equal(*out)


def test_steps_with_dropout_and_steps_outside_of_a_pass_are_full_attention() -> None:
    model = enabled()
    pair = caches(model)
    tokens = assert_same(model, pair, make_prompt(41), 12)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    logits = []
    with torch.no_grad():
        for cache in pair:
            torch.manual_seed(0)
            logits.append([model(tokens[:, -1:], past_key_values=cache).logits for _ in range(3)])
    assert torch.equal(torch.stack(logits[0]), torch.stack(logits[1]))
    model.eval()
    assert_same(model, pair, torch.cat([tokens, make_prompt(3)], dim=1), 12)


def test_a_mask_that_changes_between_steps_moves_the_pages() -> None:
    model = enabled()
    pair = caches(model)
    tokens = assert_same(model, pair, make_prompt(41, rows=2), 4)
    logits = []
    with torch.no_grad():
        for cache in pair:
            mask = torch.ones(2, 44, dtype=torch.long)
            for step in range(12):
                if step == 4:
                    mask[0, :3] = 0
                if step == 8:
                    mask[1, 20] = 0
                mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
                out = model(tokens[:, step : step + 1], past_key_values=cache, attention_mask=mask)
                logits.append(out.logits)
    assert all(torch.equal(logits[n], logits[n + 12]) for n in range(12))
