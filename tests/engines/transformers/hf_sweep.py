"""One model type from end to end: switch DELTA on, and compare with stock and with the oracle."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import Any

import torch
from hf_shrink import VOCAB, tiny_model
from hf_slow_delta import NAME, Rules, slow_logits
from torch import Tensor
from transformers import PreTrainedModel

import deltadecode as dd
from deltadecode.architecture import attention_layers
from deltadecode.errors import DeltaDecodeError

PROMPT, STEPS, SHORT = 23, 12, 4
PAGE, BUDGET, RECENT, SINK = 4, 5, 2, 1


class NotTried(Exception):
    """Transformers itself cannot build or run the tiny model."""


@dataclass(frozen=True)
class Refused:
    reason: str


@dataclass(frozen=True)
class Generated:
    tokens: Tensor  # [rows, prompt + steps]
    logits: Tensor  # [steps, rows, vocabulary] float32
    inputs: dict[str, Tensor]  # what the forward passes were given, one behind the other


def prompt(rows: int = 1, tokens: int = PROMPT) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, VOCAB, (rows, tokens), generator=generator)


def generate(
    model: PreTrainedModel, text: Tensor, steps: int | None = None, **options: Any
) -> Generated:
    if steps is None:  # one family generates from a single token, whatever the prompt
        steps = 3 * STEPS if model.config.model_type == "musicgen_decoder" else STEPS
    read: dict[str, list[Tensor]] = {"input_ids": [], "position_ids": []}

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        for name, parts in read.items():
            if kwargs.get(name) is not None:
                parts.append(kwargs[name])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    out = model.generate(
        text,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        # Some models take these for padding, wherever they stand.
        suppress_tokens=[0, 1],
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    hook.remove()
    inputs = {name: torch.cat(parts, dim=-1) for name, parts in read.items() if parts}
    return Generated(out.sequences, torch.stack(out.logits).float(), inputs)


def plan(layers: tuple[int, ...], budget: int) -> dd.DeltaConfig:
    """Dense, Δ and sparse layers; there is a sparse one wherever two layers are planned."""
    dense, rest = (layers[:1], layers[1:]) if len(layers) > 3 else ((), layers)
    return dd.DeltaConfig(
        page_size=PAGE,
        budget_pages=budget,
        recent_pages=RECENT,
        sink_pages=SINK,
        dense_layers=dense,
        delta_layers=(rest[0], *rest[2:3]) if len(rest) > 3 else rest[:1],
    )


def build(model_type: str) -> PreTrainedModel:
    try:
        return tiny_model(model_type)
    except Exception as error:
        package = re.search(r"pip install (\w+)", str(error))
        reason = str(error).strip().splitlines()[-1].strip()
        raise NotTried(f"needs {package[1]}" if package else f"Transformers: {reason}") from error


def switch_on(model: PreTrainedModel) -> tuple[int, ...] | Refused:
    """Enable DELTA with a budget for everything; the planned layers, or the refusal."""
    before = model.config._attn_implementation
    try:
        layers = attention_layers(model)
        dd.enable(model, plan(layers, budget=64))
    except DeltaDecodeError as error:
        assert "\n" not in str(error) and str(error).strip()
        assert model.config._attn_implementation == before
        return Refused(str(error))
    return tuple(record.layer for record in dd.stats(model).per_layer)


def check_type(model_type: str) -> Refused | None:
    """All checks of one type; None when DELTA runs and is right."""
    model = build(model_type)
    layers = switch_on(model)
    if isinstance(layers, Refused):
        return layers
    dd.disable(model)
    try:
        stock = generate(model, prompt())
    except RuntimeError:  # some families know no float64
        model.float()
        stock = generate(model, prompt())
    tolerance = 1e-4 if model.dtype == torch.float64 else 2e-3
    tolerance *= max(1.0, float(stock.logits.abs().max()))
    _check_all_pages(model, layers, stock, tolerance)
    got = _check_few_pages(model, layers, stock, tolerance)
    _check_padding(model, layers, tolerance)
    _check_static(model, layers, got, tolerance)
    _check_lossless(model, layers, stock, tolerance)
    dd.disable(model)
    assert torch.equal(generate(model, prompt(), SHORT).logits, stock.logits[:SHORT])
    _check_half(model, layers)
    return None


def _check_all_pages(
    model: PreTrainedModel, layers: tuple[int, ...], stock: Generated, tolerance: float
) -> None:
    """K ≥ N: tokens and logits of stock (R3)."""
    dd.enable(model, plan(layers, budget=64))
    got = generate(model, prompt())
    assert torch.equal(got.tokens, stock.tokens), "K ≥ N gives other tokens than stock"
    torch.testing.assert_close(got.logits, stock.logits, atol=tolerance, rtol=0)
    assert dd.stats(model).steps == len(stock.logits) - 1
    assert dd.stats(model).attended_fraction == 1.0


def _check_few_pages(
    model: PreTrainedModel, layers: tuple[int, ...], stock: Generated, tolerance: float
) -> Generated:
    """Small K: logits and counts of the slow DELTA of the tests."""
    dd.enable(model, plan(layers, BUDGET))
    got = generate(model, prompt())
    records = dd.stats(model).per_layer
    sparse = {r.layer: r.source for r in records if r.role == "sparse"}
    assert bool(sparse) == (len(layers) > 1), "no sparse layer runs"
    read = {r.layer: r.attended_tokens for r in records if r.role == "sparse"}
    dd.disable(model)
    # A recurrent state computed in one pass rounds otherwise than one carried step by step.
    noise = float((_oracle(model, stock, {})[0] - stock.logits[:, 0]).abs().max())
    assert noise < 10 * tolerance, "the oracle is not stock where every page is read"
    expected, rules = _oracle(model, got, sparse)
    torch.testing.assert_close(got.logits[:, 0], expected, atol=max(tolerance, 4 * noise), rtol=0)
    assert read == rules.tokens_read
    if sparse:
        assert (stock.logits - got.logits).abs().max() > 20 * tolerance, "nothing was left out"
    return got


def _oracle(model: PreTrainedModel, got: Generated, sparse: dict[int, int]) -> tuple[Tensor, Rules]:
    """Logits [steps, vocabulary] that the slow DELTA gives for the tokens that were generated."""
    inputs = dict(got.inputs)
    text = inputs.pop("input_ids")
    length = text.shape[1]
    start = length - len(got.logits) + 1  # a prompt that the model replaces is shorter than ours
    rules = Rules(PAGE, BUDGET, RECENT, SINK, sparse)
    before = model.config.get_text_config()._attn_implementation
    _set_text_attention(model, NAME)
    logits = slow_logits(model, text, range(start, length), rules, **inputs)
    _set_text_attention(model, before)
    return logits[start - 1 :].float(), rules


def _set_text_attention(model: PreTrainedModel, name: str) -> None:
    text = model.config.get_text_config()
    parts = [part for part in model.config.sub_configs if getattr(model.config, part) is text]
    model.set_attn_implementation({parts[0]: name} if parts else name)


def _check_padding(model: PreTrainedModel, layers: tuple[int, ...], tolerance: float) -> None:
    """A left-padded row gives what it gives alone, if it does in stock (R6)."""
    text, gap = prompt(2), 2
    text[1, :gap] = 0
    mask = torch.ones_like(text)
    mask[1, :gap] = 0
    alone = text[1:, gap:]

    def both() -> tuple[Generated, Generated]:
        return generate(model, text, SHORT, attention_mask=mask), generate(model, alone, SHORT)

    dd.disable(model)
    with contextlib.suppress(Exception):
        padded, single = both()
        if (padded.logits[:, 1:] - single.logits).abs().max() > tolerance:
            return  # positions or a recurrent state of the model see the padding
        dd.enable(model, plan(layers, BUDGET))
    if not _enabled(model):
        return
    padded, single = both()
    torch.testing.assert_close(padded.logits[:, 1:], single.logits, atol=tolerance, rtol=0)


def _check_static(
    model: PreTrainedModel, layers: tuple[int, ...], got: Generated, tolerance: float
) -> None:
    """The static cache gives the logits of the default one, where stock has a static one."""
    dd.disable(model)
    options = {"cache_implementation": "static", "disable_compile": True}
    try:
        generate(model, prompt(), SHORT, **options)
    except Exception:
        return
    dd.enable(model, plan(layers, BUDGET))
    try:
        static = generate(model, prompt(), SHORT, **options)
    except DeltaDecodeError as error:
        assert "\n" not in str(error)
        return
    torch.testing.assert_close(static.logits, got.logits[:SHORT], atol=tolerance, rtol=0)


def _check_lossless(
    model: PreTrainedModel, layers: tuple[int, ...], stock: Generated, tolerance: float
) -> None:
    """Lossless mode gives the tokens and the logits of full attention, or is refused."""
    dd.disable(model)
    try:
        dd.enable(model, plan(layers, BUDGET), lossless=True, draft_tokens=3)
    except DeltaDecodeError as error:
        assert "\n" not in str(error) and "take rejected drafts back" in str(error)
        return
    got = generate(model, prompt())
    assert torch.equal(got.tokens, stock.tokens)
    torch.testing.assert_close(got.logits, stock.logits, atol=tolerance, rtol=0)
    assert dd.stats(model).drafted > 0


def _check_half(model: PreTrainedModel, layers: tuple[int, ...]) -> None:
    """Autocast and bfloat16: near stock within the budget, finite past it."""
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        _check_near_stock(model, layers)
    model.bfloat16()
    _check_near_stock(model, layers)


def _check_near_stock(model: PreTrainedModel, layers: tuple[int, ...]) -> None:
    dd.disable(model)
    try:
        stock = generate(model, prompt(), SHORT)
    except Exception:
        return
    dd.enable(model, plan(layers, budget=64))
    got = generate(model, prompt(), SHORT)
    # Rounding may turn a token; the logits of that step still follow from equal tokens.
    equal = int((got.tokens == stock.tokens)[0].int().cumprod(0).sum()) - PROMPT
    scale = float(stock.logits.abs().max())
    compared = slice(0, min(equal + 1, SHORT))
    # The mean: where rounding sends a token to another expert, single logits move far.
    assert (got.logits[compared] - stock.logits[compared]).abs().mean() < 0.05 * scale
    dd.enable(model, plan(layers, BUDGET))
    assert torch.isfinite(generate(model, prompt(), SHORT).logits).all()
    assert dd.stats(model).steps == SHORT - 1


def _enabled(model: PreTrainedModel) -> bool:
    try:
        dd.stats(model)
    except ValueError:
        return False
    return True


def outcome(model_type: str) -> str:
    """What the table in docs/transformers.md says of a type."""
    try:
        refused = check_type(model_type)
    except NotTried as error:
        return f"not tried: {error}"
    if refused is None:
        return "runs"
    reason = refused.reason
    # Names and numbers of the one tiny model.
    for own in (
        r"^\w+ cannot decode with DELTA: ",
        r"^\w+Config ",
        r"^[\w.]+ \(\w+\) ",
        r" \([^)]*\d[^)]*\)",
    ):
        reason = re.sub(own, "", reason)
    return f"refused: {reason}"
