"""What ``deltadecode generate`` says after the text."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from deltadecode.config import DeltaConfig

if TYPE_CHECKING:
    from deltadecode.cli.decoding import Decoded

_SHOWN = 32


def summary(
    model: str, prompt_tokens: int, cfg: DeltaConfig | None, decoded: Decoded
) -> dict[str, Any]:
    """Make the JSON object of one generation.

    Parameters
    ----------
    model : str
        As it was named.
    prompt_tokens : int
        Length of the prompt.
    cfg : DeltaConfig or None
        None: full attention.
    decoded : Decoded
        What was written.

    Returns
    -------
    dict
        ``config`` and the counts of attended tokens are null for full attention.
    """
    return {
        "model": model,
        "attention": "full" if cfg is None else "delta",
        "prompt_tokens": prompt_tokens,
        **_written(decoded),
        "attended_tokens": None if cfg is None else decoded.attended_tokens,
        "full_tokens": None if cfg is None else decoded.full_tokens,
        "attended_fraction": None if cfg is None else _fraction(decoded),
        "config": None if cfg is None else asdict(cfg),
    }


def compared(delta: Decoded, full: Decoded) -> dict[str, Any]:
    """Compare DELTA with full attention, as part of the JSON object.

    Parameters
    ----------
    delta, full : Decoded
        Of the same prompt and settings.

    Returns
    -------
    dict
        ``first_difference`` is null when both wrote the same.
    """
    at = first_difference(delta, full)
    return {
        **_written(full),
        "same": at is None,
        "first_difference": at,
        "speedup": full.seconds / delta.seconds,
    }


def remarks(decoded: Decoded, full: Decoded | None, *, delta: bool) -> list[str]:
    """Say in a few lines what a generation took.

    Parameters
    ----------
    decoded : Decoded
        What was shown.
    full : Decoded or None
        The same with full attention, to compare with.
    delta : bool
        Whether ``decoded`` is DELTA's.

    Returns
    -------
    list of str
    """
    lines = [_took("DELTA" if delta else "full attention", decoded)]
    if delta:
        lines[0] += f"; attended to {_fraction(decoded):.1%} of what full attention reads"
    if full is None:
        return lines
    lines.append(_took("full attention", full))
    at = first_difference(decoded, full)
    if at is None:
        lines.append("both wrote the same text")
    else:
        lines.append(
            f"the texts first differ at token {at['token']}: DELTA {at['delta']!r}, "
            f"full attention {at['full']!r}"
        )
    return lines


def first_difference(delta: Decoded, full: Decoded) -> dict[str, Any] | None:
    """Find where two texts part.

    Parameters
    ----------
    delta, full : Decoded
        Two generations.

    Returns
    -------
    dict or None
        ``token``: number of equal tokens before; ``delta`` and ``full``: how each goes on.
    """
    if delta.token_ids == full.token_ids:
        return None
    pairs = zip(delta.token_ids, full.token_ids, strict=False)
    shorter = min(len(delta.token_ids), len(full.token_ids))
    token = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), shorter)
    letters = zip(delta.text, full.text, strict=False)
    end = min(len(delta.text), len(full.text))
    letter = next((i for i, (ours, theirs) in enumerate(letters) if ours != theirs), end)
    return {
        "token": token,
        "delta": delta.text[letter : letter + _SHOWN],
        "full": full.text[letter : letter + _SHOWN],
    }


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
