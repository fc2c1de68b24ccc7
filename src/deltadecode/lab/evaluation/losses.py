"""The task ``text``: losses of policies on one piece of a text, rows at once where they can."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deltadecode.lab.generation import Encoded, forced_log_probs, reads
from deltadecode.lab.policies import Policy, make_policy
from deltadecode.lab.rows import RowLosses, RowsText, refusal
from deltadecode.lab.tasks.sample import Sample, no_verdict
from deltadecode.lab.tasks.text import Text


def encode_text(task: Text, tokenizer: Any, seeds: Sequence[int]) -> list[Encoded]:
    """A piece of the text for each seed: its context is the prompt, the rest the reference."""
    context, steps = task.context, task.tokens
    return [
        Encoded(Sample(seed, "", "", steps, no_verdict), piece[:context], piece[context:], steps)
        for seed, piece in zip(seeds, task.pieces(tokenizer, seeds), strict=True)
    ]


def text_records(
    model: Any,
    tokenizer: Any,
    policies: Sequence[Policy],
    item: Encoded,
    on_steps: Sequence[Callable[[int], None]],
) -> Iterator[dict[str, Any]]:
    """A record per policy; the piece's prefix and full attention's losses are made once.

    A record holds means over the decode steps: ``nll`` of the text's own tokens, ``nll_full`` under
    full attention, ``kl`` (full || policy), in nats; ``score``, the share of steps at which both
    would write the same token; ``at_once``, whether the rows went through one forward pass.
    """
    ids, context = [*item.prompt, *item.reference], len(item.prompt)
    steps = len(item.reference) - 1
    rows: RowsText | None = None
    targets = torch.tensor(item.reference[1:], device=model.device)
    full: Tensor
    if refusal(model) is None:
        rows = RowsText.prepare(model, torch.tensor(ids), context)
        full = rows.full
    else:
        everything = make_policy("full", model, 1)
        full = forced_log_probs(model, tokenizer, everything, ids, context, lambda step: None)
    for policy, on_step in zip(policies, on_steps, strict=True):
        policy.check(context)
        at_once = rows is not None and refusal(model, policy) is None
        if at_once:
            assert rows is not None
            log_probs = rows.log_probs(model, policy)
        elif policy.name == "full":
            log_probs = full
        else:
            log_probs = forced_log_probs(model, tokenizer, policy, ids, context, on_step)
        on_step(steps)
        losses = RowLosses.of(log_probs, full, targets)
        yield {
            "seed": item.sample.seed,
            "score": float(losses.same.double().mean()),
            "nll": float(losses.nll.double().mean()),
            "nll_full": float(losses.nll_full.double().mean()),
            "kl": float(losses.kl.double().mean()),
            "tokens": steps,
            "at_once": at_once,
            "prompt": context,
            **reads(policy.counts([context], steps), 0, context, steps),
        }
