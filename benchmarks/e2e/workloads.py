"""What the end-to-end benchmark measures, as commands for an engine's process."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from deltadecode.config import MOST_DRAFTS
from deltadecode_vllm import PROPOSER

KINDS = ("headline", "step", "short", "prefill", "profile")
CACHES = ("auto", "fp8")
HEADLINE_PROMPT = 4  # tokens, as in arXiv 2510.09883
WARMUP_STEPS = 8
# Steps before those that a command times. It has been idle before, and with asynchronous scheduling
# two calls bring what was prepared meanwhile, and take as long as two steps each.
PACE_STEPS = 3
_POINT = re.compile(r"(\d+):(\d+)")
_DEFAULTS = {
    "headline": ((64, 18432),),
    "step": ((64, 2048), (64, 8192), (64, 18000), (16, 65536)),
    "short": ((64, 512), (64, 1000)),
    "prefill": ((64, 2048),),
    "profile": ((64, 8192),),
}
# An engine reads at least so many tokens of prompts at once. Sequences that were read first decode
# while the others are read, so they need this much more room.
_CHUNK = 2048
_SPARE = 16
BLOCK = 128  # tokens, at most, of a block of an engine's cache


def reading_steps(batch: int, prompt: int) -> int:
    """Steps, at most, in which an engine reads a batch of prompts of so many tokens each."""
    return -(-batch * prompt // _CHUNK)


@dataclass(frozen=True)
class Workload:
    """One thing to measure on both sides."""

    kind: str  # of KINDS
    batch: int  # sequences
    context: int  # tokens of each at the end; of a prefill, tokens of each prompt
    steps: int = 0  # decode steps of one round
    rounds: int = 1  # each of them first stock and then DELTA
    drafts: int = 0  # that each step verifies, of each sequence
    kv_cache_dtype: str = "auto"  # of CACHES
    # Whether DELTA makes the drafts itself, and stock decodes without: values are of a token then.
    lossless: bool = False
    acceptance: float | None = None  # of each draft, drawn and not found out; None: found out

    @property
    def case(self) -> str:
        """Name of its row."""
        cache = "" if self.kv_cache_dtype == "auto" else f", {self.kv_cache_dtype} cache"
        if self.kind == "headline":
            return f"batch {self.batch}, {HEADLINE_PROMPT} to {self.context} tokens{cache}"
        if self.kind == "prefill":
            return f"prefill, batch {self.batch}, {self.context} tokens{cache}"
        before = {"step": "", "short": "short ", "profile": "GPU time of a "}[self.kind]
        what = "decode step"
        if self.drafts:
            what += f" with {self.drafts} drafts"
        if self.lossless:
            what = f"token, lossless with {self.drafts} drafts"
        if self.acceptance is not None:
            what += f", synthetic acceptance {self.acceptance:g}"
        return f"{before}{what}, batch {self.batch}, context {self.context}{cache}"

    @property
    def unit(self) -> str:
        """Unit of its values; less is better."""
        return "s" if self.kind in ("headline", "prefill") else "ms"

    @property
    def prompt(self) -> int:
        """Tokens of each prompt."""
        if self.holds:
            return self.context - self._decoded
        return HEADLINE_PROMPT if self.kind == "headline" else self.context

    @property
    def new_tokens(self) -> int:
        """Tokens that each sequence may write."""
        if self.holds:
            steps = self._decoded + reading_steps(self.batch, self.prompt) + _SPARE
            return steps * (1 + self.drafts)  # if all were accepted
        return self.context - HEADLINE_PROMPT if self.kind == "headline" else 1

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt + self.new_tokens

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache has to hold at once, with a block's rest for each sequence."""
        return self.batch * (self.longest + BLOCK)

    @property
    def holds(self) -> bool:
        """Whether its sequences stay in the cache between rounds."""
        return self.kind in ("step", "short", "profile")

    @property
    def _decoded(self) -> int:
        return WARMUP_STEPS + PACE_STEPS + self.rounds * (self.steps + PACE_STEPS)

    def opening(self) -> list[dict[str, Any]]:
        """Commands that prepare a side and measure nothing."""
        if self.kind == "prefill":
            return [self._command("prefill")]
        if self.holds:
            return [self._command("fill"), {"do": "steps", "steps": WARMUP_STEPS}]
        return []

    def measuring(self) -> dict[str, Any]:
        """The command of one round."""
        if self.kind in ("step", "short"):
            return {"do": "steps", "steps": self.steps}
        if self.kind == "profile":
            return {"do": "profile", "steps": self.steps}
        return self._command(self.kind)

    def closing(self) -> list[dict[str, Any]]:
        """Commands that free the cache."""
        return [{"do": "drop"}] if self.holds else []

    def _command(self, do: str) -> dict[str, Any]:
        size = {"batch": self.batch, "prompt": self.prompt, "new_tokens": self.new_tokens}
        return {"do": do, **size}


def own_drafts(count: int, acceptance: float | None) -> dict[str, Any]:
    """Speculative configuration of vLLM in lossless mode.

    With an acceptance vLLM draws whether a draft holds: of random weights it would say nothing.
    """
    own = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": count}
    return {**own, **drawn_acceptance(count, acceptance)}


def drawn_acceptance(count: int, acceptance: float | None) -> dict[str, Any]:
    """What has vLLM draw whether each of ``count`` drafts holds; empty without an acceptance.

    A step gives 1 + a + a² + ... tokens on average, with a power for each draft.
    """
    if acceptance is None:
        return {}
    # Of a draft and all before it.
    rates = [acceptance ** (place + 1) for place in range(count)]
    return {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}


def check_drafts(lossless: bool, drafts: int, acceptance: float | None) -> None:
    """Check what drafts are measured with; a ValueError for what cannot be."""
    if lossless and not 1 <= drafts <= MOST_DRAFTS:
        raise ValueError(f"drafts must be in 1..{MOST_DRAFTS} with --lossless, got {drafts}")
    if acceptance is not None and not drafts:
        raise ValueError(f"acceptance is of drafts, got {acceptance} without --drafts")
    if acceptance is not None and not 0 < acceptance <= 1:
        raise ValueError(f"acceptance must be above 0 and at most 1, got {acceptance}")


def parse_point(text: str) -> tuple[int, int]:
    """Read ``batch:context``, such as ``64:8192``; a ValueError for anything else."""
    match = _POINT.fullmatch(text)
    if not match or not int(match[1]) or not int(match[2]):
        raise ValueError(f"a point must be batch:context, such as 64:8192, got {text!r}")
    return int(match[1]), int(match[2])


def workloads(
    kinds: Iterable[str] = (),
    points: Sequence[tuple[int, int]] = (),
    *,
    steps: int = 64,
    rounds: int | None = None,
    drafts: int = 0,
    kv_cache_dtype: str = "auto",
    lossless: bool = False,
    acceptance: float | None = None,
) -> list[Workload]:
    """Choose what to measure, in the order of the kinds; by default all of them.

    Points (batch, context) replace the defaults of the chosen kinds. ``steps`` are those of a round
    of ``step`` and ``short``, ``rounds`` those of all kinds but ``profile``, by default 3 and of a
    headline, which takes minutes, 1. A ValueError for an unknown kind or cache, ``drafts`` in a
    kind of no single steps, or a context that the measured steps alone would fill.
    """
    chosen = tuple(kinds) or KINDS
    for kind in chosen:
        if kind not in KINDS:
            raise ValueError(f"workload must be one of {', '.join(KINDS)}, got {kind!r}")
    check_drafts(lossless, drafts, acceptance)
    if kv_cache_dtype not in CACHES:
        raise ValueError(f"kv_cache_dtype must be {' or '.join(CACHES)}, got {kv_cache_dtype!r}")
    selected = []
    for kind in dict.fromkeys(chosen):
        for batch, context in points or _DEFAULTS[kind]:
            timed = {"step": steps, "short": steps, "profile": 3}.get(kind, 0)
            repeated = {"headline": rounds or 1, "profile": 1}.get(kind, rounds or 3)
            one = Workload(
                kind, batch, context, timed, repeated, drafts, kv_cache_dtype, lossless, acceptance
            )
            if drafts and not one.holds:
                raise ValueError(f"drafts are for step, short and profile, got {kind!r}")
            if one.prompt < 1 or one.new_tokens < 1:
                raise ValueError(
                    f"context must be longer than the {one.context - one.prompt} tokens decoded "
                    f"at {batch}:{context}; take a longer one or fewer steps"
                )
            selected.append(one)
    return selected


def needs(chosen: Sequence[Workload]) -> tuple[int, int]:
    """Sequences at once, and tokens of the longest one, that an engine has to hold."""
    return max(one.batch for one in chosen), max(one.longest for one in chosen)
