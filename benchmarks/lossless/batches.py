"""Left-padded batches of unlike lengths: whether every token is that of full attention."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import deltadecode as dd
from benchmarks.lossless.run import PEER, make_plan, make_prompts
from benchmarks.report import Progress
from deltadecode.cli.loading import load_model, load_tokenizer
from deltadecode.lab.results import result, row


def run(
    folder: str,
    contexts: Sequence[int],
    budgets: Sequence[int],
    drafts: Sequence[int],
    *,
    page_size: int,
    texts: int,
    tokens: int,
    batch: int,
    command: str,
    progress: Progress = lambda case, done: None,
) -> dict[str, Any]:
    """A row for each context, budget and number of drafts, in tokens: those that are equal, of all.

    The prompts of a batch are from half a context long to a whole one. ``first_unlike`` is null, or
    the text and the place of the first token that differs.
    """
    model, tokenizer = load_model(folder, "float32", torch.device("cpu")), load_tokenizer(folder)
    cases = list(product(contexts, budgets, drafts))
    done, parts = 0, len(contexts) * -(-texts // batch) * (1 + len(budgets) * len(drafts))
    stock: dict[int, list[Tensor]] = {context: [] for context in contexts}
    ours: dict[tuple[int, int, int], list[Tensor]] = {case: [] for case in cases}
    counts: dict[tuple[int, int, int], list[int]] = {case: [0] * 5 for case in cases}
    for context in contexts:
        prompts = [prompt[0] for prompt in make_prompts(tokenizer, context, texts, tokens)]
        for first in range(0, texts, batch):
            padded = left_padded(prompts[first : first + batch])
            progress(f"context {context}, texts from {first}: full attention", done / parts)
            stock[context].append(_generate(model, *padded, tokens))
            done += 1
            for case in (case for case in cases if case[0] == context):
                _, budget, count = case
                progress(f"context {context}, texts from {first}: K {budget}", done / parts)
                cfg = make_plan(model, page_size, budget)
                dd.enable(model, cfg, lossless=True, draft_tokens=count or None)
                ours[case].append(_generate(model, *padded, tokens))
                read = dd.stats(model)
                new = (
                    read.drafted, read.verified, read.accepted, read.attended_tokens,
                    read.full_tokens,
                )  # fmt: skip
                counts[case] = [sum(pair) for pair in zip(counts[case], new, strict=True)]
                dd.disable(model)
                done += 1
    rows = [
        _row(case, torch.cat(ours[case]), torch.cat(stock[case[0]]), counts[case], page_size, batch)
        for case in cases
    ]
    return result("lossless", command, rows)


def left_padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ends of prompts [any], from a half to the whole, as one batch: token ids and their mask."""
    size = max(len(prompts) - 1, 1)
    parts = [
        prompt[: len(prompt) - len(prompt) * place // (2 * size)]
        for place, prompt in enumerate(prompts)
    ]
    width = max(map(len, parts))
    tokens = torch.stack([F.pad(part, (width - len(part), 0)) for part in parts])
    lengths = torch.tensor([len(part) for part in parts])
    return tokens, (torch.arange(width) >= width - lengths[:, None]).long()


def _generate(model: Any, tokens: Tensor, mask: Tensor, new: int) -> Tensor:
    """New tokens [B, new], greedy."""
    with torch.inference_mode():
        ids: Tensor = model.generate(
            tokens, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
    return ids[:, tokens.shape[1] :]


def _row(
    case: tuple[int, int, int],
    ours: Tensor,
    theirs: Tensor,
    counts: list[int],
    page_size: int,
    batch: int,
) -> dict[str, Any]:
    context, budget, count = case
    equal = ours == theirs
    drafted, verified, accepted, attended, full = counts
    unlike = (~equal).nonzero()
    counted = row(
        f"context {context}, K {budget}, {count} drafts, batches of {batch}", PEER, "equal tokens",
        int(equal.sum()), equal.numel(), context=context, budget_pages=budget, page_size=page_size,
        draft_tokens=count, batch=batch, texts=len(equal), tokens=equal.numel(),
        same=int(equal.all(dim=1).sum()), first_unlike=unlike[0].tolist() if len(unlike) else None,
        drafted=drafted, verified=verified, accepted=accepted,
        acceptance=round(accepted / max(verified, 1), 4),
        attended_fraction=round(attended / full, 4),
    )  # fmt: skip
    # Here more is better.
    return {**counted, "ratio": round(counted["ours"] / counted["theirs"], 3)}
