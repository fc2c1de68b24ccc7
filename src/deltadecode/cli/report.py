"""What ``deltadecode generate`` says after the text."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from deltadecode.config import DeltaConfig

if TYPE_CHECKING:
    from deltadecode.cli.decoding import Decoded

# What ran without DELTA, of a model of any architecture, or of one with attention of its own.
FULL_ATTENTION, OWN_ATTENTION = "full attention", "the model's own attention"
_LETTERS = 32  # shown of two texts where they part


def summary(
    model: str, prompt_tokens: int, cfg: DeltaConfig | None, decoded: Decoded
) -> dict[str, Any]:
    """The JSON object of one generation; no config, full attention: its DELTA values are null."""
    return {
        "model": model,
        "attention": "full" if cfg is None else "delta",
        "prompt_tokens": prompt_tokens,
        **_written(decoded),
        "attended_tokens": None if cfg is None else decoded.attended_tokens,
        "full_tokens": None if cfg is None else decoded.full_tokens,
        "attended_fraction": None if cfg is None else _fraction(decoded),
        "lossless": decoded.drafts,
        "config": None if cfg is None else asdict(cfg),
    }


def compared(delta: Decoded, full: Decoded) -> dict[str, Any]:
    """The part of the JSON object that compares both; ``first_difference`` is null if equal."""
    difference = first_difference(delta, full)
    return {
        **_written(full),
        "same": difference is None,
        "first_difference": difference,
        "speedup": full.seconds / delta.seconds,
    }


def remarks(
    decoded: Decoded, full: Decoded | None, *, delta: bool, stock: str = FULL_ATTENTION
) -> list[str]:
    """Lines on what a generation took, DELTA's or not, and on full attention to compare with."""
    lines = [_took("DELTA" if delta else stock, decoded)]
    if delta:
        if decoded.drafts is not None:
            lines.append(
                "lossless: {accepted} of {verified} verified drafts held".format(**decoded.drafts)
            )
        lines[0] += f"; attended to {_fraction(decoded):.1%} of what full attention reads"
    if full is None:
        return lines
    lines.append(_took(FULL_ATTENTION, full))
    difference = first_difference(decoded, full)
    if difference is None:
        lines.append("both wrote the same text")
    else:
        lines.append(
            f"the texts first differ at token {difference['token']}: DELTA "
            f"{difference['delta']!r}, full attention {difference['full']!r}"
        )
    return lines


def first_difference(delta: Decoded, full: Decoded) -> dict[str, Any] | None:
    """Where two texts part: the number of equal tokens before, and how each goes on."""
    if delta.token_ids == full.token_ids:
        return None
    place = _equal(delta.text, full.text)
    return {
        "token": _equal(delta.token_ids, full.token_ids),
        "delta": delta.text[place : place + _LETTERS],
        "full": full.text[place : place + _LETTERS],
    }


def _equal(first: Any, second: Any) -> int:
    """Length of what two sequences begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    shorter = min(len(first), len(second))
    return next((place for place, (one, other) in pairs if one != other), shorter)


def _written(decoded: Decoded) -> dict[str, Any]:
    return {
        "text": decoded.text,
        "tokens_generated": len(decoded.token_ids),
        "seconds": decoded.seconds,
        "seconds_to_first": decoded.seconds_to_first,
        "tokens_per_second": decoded.tokens_per_second,
    }


def _fraction(decoded: Decoded) -> float:
    return decoded.attended_tokens / decoded.full_tokens if decoded.full_tokens else 1.0


def _took(name: str, decoded: Decoded) -> str:
    return (
        f"{name}: {len(decoded.token_ids)} tokens in {decoded.seconds:.1f} s, "
        f"{decoded.tokens_per_second:.1f} tok/s after the first"
    )
