"""Batches of unlike lengths: whether every token is that of full attention."""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import deltadecode as dd
from benchmarks.lossless.asked import Asked, Case
from benchmarks.lossless.run import PEER, make_plan, make_prompts
from benchmarks.report import Progress
from deltadecode.cli.loading import load_model, load_tokenizer
from deltadecode.lab.results import result, row

# New tokens [texts, tokens], and counts of what was drafted.
Written = tuple[Tensor, dict[str, int]]


def run(
    asked: Asked,
    *,
    batch: int,
    engine: str = "transformers",
    command: str,
    progress: Progress = lambda case, done: None,
) -> dict[str, Any]:
    """A row for each case, in tokens: those that are equal, of all.

    ``first_unlike`` is null, or the text and the place of the first token that differs.
    """
    tokenizer, done = load_tokenizer(asked.folder), 0
    stock: dict[int, Tensor] = {}
    rows: dict[Case, dict[str, Any]] = {}
    start: Callable[[Asked, int], Any] = InTransformers
    if engine == "vllm":
        from benchmarks.lossless.in_vllm import InVllm

        start = InVllm
    with closing(start(asked, batch)) as side:
        for context in asked.contexts:
            prompts = ragged(make_prompts(tokenizer, context, asked.texts, asked.tokens), batch)
            progress(f"context {context}: full attention", done / asked.parts)
            stock[context] = side.generate(prompts, None)[0]
            done += 1
            for case in (case for case in asked.cases if case[0] == context):
                progress(f"context {context}: K {case[1]}, {case[2]} drafts", done / asked.parts)
                ours = side.generate(prompts, case)
                rows[case] = _row(side.peer, case, ours, stock[context], asked.page_size, batch)
                done += 1
    return result("lossless", command, [rows[case] for case in asked.cases])


def ragged(prompts: Sequence[Tensor], batch: int) -> list[Tensor]:
    """Beginnings of prompts [1, any]; in each batch, from the whole down to a half."""
    size = max(min(batch, len(prompts)) - 1, 1)
    return [
        prompt[0, : prompt.numel() - prompt.numel() * (place % batch) // (2 * size)]
        for place, prompt in enumerate(prompts)
    ]


def left_padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts as one batch: token ids and their mask."""
    width = max(map(len, prompts))
    tokens = torch.stack([F.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return tokens, (torch.arange(width) >= width - lengths[:, None]).long()


class InTransformers:
    """Left-padded batches of ``generate``."""

    peer = PEER

    def __init__(self, asked: Asked, batch: int) -> None:
        self._asked, self._batch = asked, batch
        self._model = load_model(asked.folder, "float32", torch.device("cpu"))

    def generate(self, prompts: Sequence[Tensor], case: Case | None) -> Written:
        """New tokens of prompts, with full attention or in lossless mode."""
        parts, counts = (
            [],
            dict.fromkeys(("drafted", "verified", "accepted", "attended", "full"), 0),
        )
        for first in range(0, len(prompts), self._batch):
            padded = left_padded(prompts[first : first + self._batch])
            if case is None:
                parts.append(self._write(*padded))
                continue
            cfg = make_plan(self._model, self._asked.page_size, case[1])
            dd.enable(self._model, cfg, lossless=True, draft_tokens=case[2] or None)
            parts.append(self._write(*padded))
            read = dd.stats(self._model)
            for name in ("drafted", "verified", "accepted"):
                counts[name] += getattr(read, name)
            counts["attended"] += read.attended_tokens
            counts["full"] += read.full_tokens
            dd.disable(self._model)
        return torch.cat(parts), counts

    def _write(self, tokens: Tensor, mask: Tensor) -> Tensor:
        new = self._asked.tokens
        with torch.inference_mode():
            ids: Tensor = self._model.generate(
                tokens, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False
            )
        return ids[:, tokens.shape[1] :]

    def close(self) -> None:
        """Nothing is left running."""


def _row(
    peer: str, case: Case, ours: Written, theirs: Tensor, page_size: int, batch: int
) -> dict[str, Any]:
    context, budget, count = case
    tokens, counts = ours
    equal = tokens == theirs
    unlike = (~equal).nonzero()
    attended, full = counts.pop("attended"), counts.pop("full")
    counted = row(
        f"context {context}, K {budget}, {count} drafts, batches of {batch}", peer, "equal tokens",
        int(equal.sum()), equal.numel(), context=context, budget_pages=budget, page_size=page_size,
        draft_tokens=count, batch=batch, texts=len(equal), tokens=equal.numel(),
        same=int(equal.all(dim=1).sum()), first_unlike=unlike[0].tolist() if len(unlike) else None,
        **counts,
        acceptance=round(counts["accepted"] / max(counts["verified"], 1), 4),
        attended_fraction=round(attended / full, 4),
    )  # fmt: skip
    # Here more is better.
    return {**counted, "ratio": round(counted["ours"] / counted["theirs"], 3)}
