"""Prompts of a real text, decoded in lossless mode and with full attention."""

from dataclasses import replace
from typing import Any

import torch

from benchmarks.lossless.asked import Asked, Case
from benchmarks.report import Progress
from deltadecode.cli.decoding import Decoded, decode
from deltadecode.cli.loading import load_model, load_tokenizer
from deltadecode.config import DeltaConfig
from deltadecode.lab.results import result, row
from deltadecode.lab.tasks import make_problem
from deltadecode.lab.tasks.text import Text

PEER = "Transformers sdpa + DynamicCache"
STATIC_PEER = "Transformers sdpa + StaticCache, compiled on a GPU"
_RECENT, _SINK = 8, 1
# Enough for the longest context that the embedded model has: about 35 tokens a step.
_STEPS = 300


def run(
    asked: Asked, *, command: str, progress: Progress = lambda case, done: None
) -> dict[str, Any]:
    """A row for each case, in milliseconds a decoded token.

    ``acceptance`` is the share of verified drafts that stayed, ``same`` the texts whose every token
    is that of full attention.
    """
    device = torch.device(asked.device)
    model = load_model(asked.folder, "float32", device)
    tokenizer, tokens = load_tokenizer(asked.folder), asked.tokens
    settings: dict[str, Any] = {
        "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False,
    }  # fmt: skip
    if asked.static:
        settings["cache_implementation"] = "static"
    runs = 2 if asked.static else 1  # the first one compiles and captures
    decoded: dict[Case, list[Decoded]] = {case: [] for case in asked.cases}
    stock: dict[int, list[Decoded]] = {context: [] for context in asked.contexts}
    done, parts = 0, asked.parts * asked.texts
    for context in asked.contexts:
        for prompt in make_prompts(tokenizer, context, asked.texts, tokens):
            prompt = prompt.to(device)
            progress(f"context {context}: full attention", done / parts)
            stock[context].append(
                decode(model, tokenizer, prompt, None, settings=settings, runs=runs)
            )
            done += 1
            for case in (case for case in asked.cases if case[0] == context):
                _, budget, count = case
                progress(f"context {context}: K {budget}, {count} drafts", done / parts)
                cfg = make_plan(model, asked.page_size, budget)
                decoded[case].append(
                    decode(
                        model,
                        tokenizer,
                        prompt,
                        cfg,
                        settings=settings,
                        lossless=True,
                        draft_tokens=count or None,
                        runs=runs,
                    )
                )
                done += 1
    return result(
        "lossless",
        command,
        [_row(asked, case, decoded[case], stock[case[0]]) for case in asked.cases],
    )


def make_plan(model: Any, page_size: int, budget: int) -> DeltaConfig:
    """The model's own plan with other pages."""
    return replace(
        DeltaConfig.for_model(model), page_size=page_size, budget_pages=budget, budget_share=0.0,
        recent_pages=_RECENT, sink_pages=_SINK,
    )  # fmt: skip


def make_prompts(tokenizer: Any, context: int, texts: int, tokens: int) -> list[torch.Tensor]:
    """Token ids [1, context] of each prompt.

    Of the embedded model they are chain problems with the beginning of their solution, of others
    pieces of Python's own documentation.
    """
    if tokenizer.vocab_size > 1000:
        task = Text(source="stdlib-docs", context=context, tokens=tokens)
        pieces = task.pieces(tokenizer, range(texts))
    else:
        problems = [make_problem(seed, steps=_STEPS) for seed in range(texts)]
        pieces = [tokenizer(problem.prompt + problem.solution).input_ids for problem in problems]
    if min(map(len, pieces)) < context:
        raise ValueError(f"--context must be at most {min(map(len, pieces))}, got {context}")
    return [torch.tensor([piece[:context]]) for piece in pieces]


def _row(asked: Asked, case: Case, ours: list[Decoded], theirs: list[Decoded]) -> dict[str, Any]:
    context, budget, count = case
    drafts = {
        name: sum((each.drafts or {})[name] for each in ours)
        for name in ("drafted", "verified", "accepted")
    }
    pairs = zip(ours, theirs, strict=True)
    attended, full = (
        sum(getattr(each, name) for each in ours) for name in ("attended_tokens", "full_tokens")
    )
    return row(
        f"context {context}, K {budget}, {count} drafts", STATIC_PEER if asked.static else PEER,
        "ms a token", _ms(ours), _ms(theirs),
        context=context, budget_pages=budget, page_size=asked.page_size,
        draft_tokens=count, texts=len(ours), tokens=sum(len(each.token_ids) for each in ours),
        same=sum(one.token_ids == other.token_ids for one, other in pairs), **drafts,
        acceptance=round(drafts["accepted"] / max(drafts["verified"], 1), 4),
        attended_fraction=round(attended / full, 4),
    )  # fmt: skip


def _ms(decoded: list[Decoded]) -> float:
    """Milliseconds a token after the first."""
    seconds = sum(each.seconds - each.seconds_to_first for each in decoded)
    return 1000 * seconds / sum(len(each.token_ids) - 1 for each in decoded)
