"""One timed ``model.generate``: with DELTA or without, its text shown as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer, set_seed

from deltadecode.config import DeltaConfig
from deltadecode.engines.transformers import disable, enable, stats


@dataclass(frozen=True)
class Decoded:
    """What one side wrote, and what it took.

    Attributes
    ----------
    text, token_ids
        What is new; the text without special tokens.
    seconds : float
        For prompt and new tokens.
    seconds_to_first : float
        For the prompt and the first token.
    attended_tokens, full_tokens : int
        Over all decode steps and planned layers: tokens read, and those of full attention.
    drafts : dict or None
        In lossless mode, how many were drafted, verified and accepted.
    """

    text: str
    token_ids: list[int]
    seconds: float
    seconds_to_first: float
    attended_tokens: int
    full_tokens: int
    drafts: dict[str, int] | None = None

    @property
    def tokens_per_second(self) -> float:
        """New tokens after the first one, per second after the first one."""
        taken = self.seconds - self.seconds_to_first
        return (len(self.token_ids) - 1) / taken if taken > 0 else 0.0


class Follower(TextStreamer):
    """Passes on the number of new tokens, and text as soon as later tokens cannot change it."""

    def __init__(
        self, tokenizer: Any, on_token: Callable[[int], None], on_text: Callable[[str], None]
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens = 0
        self.first: float | None = None
        self._on_token = on_token
        self._on_text = on_text

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one new token at a time."""
        if not self.next_tokens_are_prompt:
            self.tokens += value.numel()
            if self.first is None:
                self.first = time.perf_counter()
            self._on_token(self.tokens)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass text on."""
        if text:
            self._on_text(text)


def decode(
    model: Any,
    tokenizer: Any,
    prompt_ids: Tensor,
    cfg: DeltaConfig | None,
    *,
    settings: dict[str, Any],
    seed: int = 0,
    lossless: bool = False,
    draft_tokens: int | None = None,
    kv_dtype: str | None = None,
    runs: int = 1,
    on_token: Callable[[int], None] = lambda tokens: None,
    on_text: Callable[[str], None] = lambda text: None,
) -> Decoded:
    """Generate once; DELTA is enabled on the model only while it decodes.

    ``prompt_ids`` is [1, tokens] on the model's device; without a configuration, attention and
    cache are the stock ones; ``settings`` are arguments of ``model.generate``. ``lossless``,
    ``draft_tokens`` and ``kv_dtype`` are those of :func:`deltadecode.enable`. Of several ``runs``
    the last one counts: what the first ones compile and capture is there then.
    """
    if cfg is not None:
        enable(model, cfg, lossless=lossless, draft_tokens=draft_tokens, kv_dtype=kv_dtype)
    try:
        for _ in range(runs):
            follower = Follower(tokenizer, on_token, on_text)
            if cfg is not None:
                stats(model).reset()
            set_seed(seed)
            start = time.perf_counter()
            with torch.inference_mode():
                output = model.generate(
                    prompt_ids,
                    attention_mask=torch.ones_like(prompt_ids),
                    streamer=follower,
                    **settings,
                )
        new = output[0, prompt_ids.shape[1] :].tolist()
        seconds = time.perf_counter() - start
        read = stats(model) if cfg is not None else None
        drafts = None
        if read is not None and lossless:
            drafts = {name: getattr(read, name) for name in ("drafted", "verified", "accepted")}
        counts = (read.attended_tokens, read.full_tokens) if read is not None else (0, 0)
    finally:
        disable(model)
    first = follower.first if follower.first is not None else start + seconds
    return Decoded(
        text=tokenizer.decode(new, skip_special_tokens=True),
        token_ids=new,
        seconds=seconds,
        seconds_to_first=first - start,
        attended_tokens=counts[0],
        full_tokens=counts[1],
        drafts=drafts,
    )
