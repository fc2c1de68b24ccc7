"""Compiled models decode from growing caches as they do uncompiled, bit for bit."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hf_tiny import generate, make_model, make_prompt, small_config
from hf_twins import cache_of

import deltadecode as dd
from deltadecode.engines.transformers.offload_host import Transfer


@pytest.fixture(autouse=True)
def compile_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def enabled(**options: Any) -> Any:
    # A dense, a Δ- and a sparse layer: each of them takes its time to compile.
    model = make_model("llama", "sdpa", num_hidden_layers=3)
    dd.enable(model, small_config(delta_layers=(1,)), **options)
    return model


def logits(model: Any, forward: Any, cache: Any, counts: tuple[int, ...]) -> Any:
    """Logits of passes of so many tokens each, with the counts."""
    dd.stats(model).reset()
    found = []
    with torch.no_grad():
        for place, count in enumerate(counts):
            tokens = make_prompt(count, 2, seed=place)
            found.append(forward(input_ids=tokens, past_key_values=cache).logits[:, -1])
    return torch.stack(found), dd.stats(model).per_layer


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("kind", ["default", "offloaded"])
def test_steps_from_within_the_budget_to_beyond(kind: str, kv_dtype: str | None) -> None:
    model, counts = enabled(), (19, 1, 1, 5, 1, 1)
    plain = logits(model, model, cache_of(model, kind, kv_dtype), counts)
    assert dd.stats(model).attended_fraction < 1
    compiled = torch.compile(model, backend="eager")
    ours = logits(model, compiled, cache_of(model, kind, kv_dtype), counts)
    assert torch.equal(ours[0], plain[0])
    assert ours[1] == plain[1]


def test_generate_with_a_compiled_forward_and_eight_bits() -> None:
    model = enabled(kv_dtype="int8")
    plain = generate(model, make_prompt(31), 4)
    model.forward = torch.compile(model.forward, backend="eager")
    ours = generate(model, make_prompt(31), 4)
    assert ours.past_key_values.kv_dtype == "int8"
    assert torch.equal(torch.stack(ours.logits), torch.stack(plain.logits))


class Watched(Transfer):
    """Notes which calls a compiler traces: streams and pinned memory are not for it."""

    def __init__(self) -> None:
        self.traced: list[bool] = []

    def check(self, device: torch.device) -> None:
        self.traced.append(torch.compiler.is_dynamo_compiling())

    def settle(self) -> None:
        self.traced.append(torch.compiler.is_dynamo_compiling())


def test_no_transfer_is_traced() -> None:
    model, transfer = enabled(), Watched()
    cfg = small_config(delta_layers=(1,))
    cache = dd.DeltaOffloadedCache(model.config, cfg, transfer=transfer)
    logits(model, torch.compile(model, backend="eager"), cache, (31, 1))
    assert transfer.traced
    assert not any(transfer.traced)
