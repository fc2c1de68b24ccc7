"""A model with layer graphs and its twin without: both must give the same, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hf_pieces import SimulatedPiece
from hf_tiny import make_model, make_prompt, small_config, stock_name

import deltadecode as dd
from deltadecode.engines.transformers.offload_host import Transfer

EXPERTS = ("gpt_oss", "qwen3_moe", "mixtral")


def make(family: str = "llama", experts: str = "grouped_mm", **changes: Any) -> Any:
    model = make_model(family, stock_name(family))
    if family in EXPERTS:
        model.set_experts_implementation(experts)
    dd.enable(model, small_config(family, **changes), layer_graphs=True)
    return model


def cache_of(model: Any, kind: str, kv_dtype: str | None = None) -> Any:
    if kind == "default":
        return dd.DeltaCache(model.config, kv_dtype=kv_dtype)
    cfg = next(hook.state.cfg for hook in model.model._forward_pre_hooks.values())
    return dd.DeltaOffloadedCache(model.config, cfg, transfer=Transfer(), kv_dtype=kv_dtype)


def plain(model: Any) -> Any:
    """The same model without layer graphs, a copy."""
    twin = copy.deepcopy(model)
    cfg = next(hook.state.cfg for hook in twin.model._forward_pre_hooks.values())
    dd.enable(twin, cfg)
    return twin


def run(model: Any, prompt: Any, steps: int, **options: Any) -> Any:
    dd.stats(model).reset()
    torch.manual_seed(0)
    out = model.generate(
        prompt, max_new_tokens=steps,
        **{"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **options},
    )  # fmt: skip
    stats = dd.stats(model)
    return out.sequences, torch.stack(out.logits), stats.per_layer, stats.steps


def assert_same(pair: Any, prompt: Any, steps: int, *, caches: Any = None, **options: Any) -> Any:
    """A model and its :func:`plain` twin give the same; gives the tokens."""
    caches = caches or (None, None)
    ours, theirs = (
        run(model, prompt, steps, past_key_values=cache, **options)
        for model, cache in zip(pair, caches, strict=True)
    )
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert ours[2:] == theirs[2:]
    return ours[0]


def padded(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(lengths)
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
    return make_prompt(longest, len(lengths)) * mask, mask


def replays(pieces: list[SimulatedPiece]) -> set[int]:
    """How often pieces were replayed, after the step that recorded them."""
    return {piece.replays - 1 for piece in pieces}


def forwards(model: Any) -> list[Any]:
    return [vars(layer).get("forward") for layer in model.model.layers]
