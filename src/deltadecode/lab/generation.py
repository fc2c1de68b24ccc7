"""One batch of samples through ``model.generate`` under one policy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from deltadecode.engines.transformers import DeltaCache
from deltadecode.errors import EvaluationError
from deltadecode.lab.policies import Policy
from deltadecode.lab.policies.delta import Delta
from deltadecode.lab.tasks.sample import Sample, no_verdict

OnStep = Callable[[int], None]  # told the number of new tokens
_BEYOND = 0.05  # new tokens beyond the reference, as a share of it: enough to see that it went on
_LEAST_BEYOND = 16


@dataclass(frozen=True)
class Encoded:
    """A sample in tokens."""

    sample: Sample
    prompt: list[int]
    reference: list[int]  # what a perfect model writes; empty if there is no such text
    max_new_tokens: int  # a row of a batch is cut there, whatever its neighbours need


def encode(samples: Sequence[Sample], tokenizer: Any, *, chat: bool) -> list[Encoded]:
    """Encode samples; EvaluationError when ``chat`` finds no chat template."""
    if chat and not getattr(tokenizer, "chat_template", None):
        raise EvaluationError("--chat needs a tokenizer with a chat template; this one has none")
    encoded = []
    for sample in samples:
        prompt = sample.prompt
        if chat:
            message = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, tokenize=False
            )
        ids = tokenizer(prompt, add_special_tokens=not chat).input_ids
        reference = tokenizer(sample.reference, add_special_tokens=False).input_ids
        max_new_tokens = sample.max_new_tokens
        if reference:
            reference = [*reference, *eos_ids(tokenizer)]
            max_new_tokens = len(reference) + max(_LEAST_BEYOND, int(_BEYOND * len(reference)))
        encoded.append(Encoded(sample, ids, reference, max_new_tokens))
    return encoded


def unchecked(prompt: Sequence[int], max_new_tokens: int) -> Encoded:
    """A prompt that is only continued, by so many tokens at most; no answer is expected of it."""
    return Encoded(Sample(0, "", "", 0, no_verdict), list(prompt), [], max_new_tokens)


def eos_ids(tokenizer: Any) -> list[int]:
    """The token that ends a text, if there is one."""
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text, by the tokenizer and by the model."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, (list, tuple)) else [ends]
    return {*eos_ids(tokenizer), *map(int, ends)}


def pad_id(tokenizer: Any) -> int:
    """The token that fills rows up: the tokenizer's own, else the one that ends a text, else 0."""
    pad = tokenizer.pad_token_id
    return (eos_ids(tokenizer) or [0])[0] if pad is None else int(pad)


def pad_left(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and their mask."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids.to(device), mask.to(device)


class _Ticker(StoppingCriteria):
    """Stops nothing, but tells of every step."""

    def __init__(self, on_step: OnStep) -> None:
        self.tokens, self._on_step = 0, on_step

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.tokens += 1
        if self.tokens == 1 and input_ids.is_cuda:
            # The mask of a padded prompt takes tens of GB for a moment; others may use the device.
            torch.cuda.empty_cache()
        self._on_step(self.tokens)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _TeacherForcing(LogitsProcessor):
    """Makes generation write given tokens, and notes what the model thinks of them.

    Or, with ``whole``, what it thinks of all tokens.
    """

    def __init__(self, targets: Tensor, *, whole: bool = False) -> None:
        self.targets, self.whole = targets, whole  # [B, steps]
        self.log_probs: list[Tensor] = []
        self.best: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        target = self.targets[:, len(self.best), None]
        log_probs = scores.float().log_softmax(dim=1)
        self.log_probs.append(log_probs if self.whole else log_probs.gather(1, target)[:, 0])
        self.best.append(scores.argmax(dim=1))
        return torch.full_like(scores, -torch.inf).scatter_(1, target, 0.0)


def new_tokens(
    model: Any,
    tokenizer: Any,
    policy: Policy,
    batch: Sequence[Encoded],
    steps: int,
    on_step: OnStep,
    forcing: _TeacherForcing | None = None,
) -> Tensor:
    """Greedy continuation of a batch; [B, steps] or shorter, on the CPU."""
    pad = pad_id(tokenizer)
    ids, mask = pad_left([item.prompt for item in batch], pad, model.device)
    # DELTA makes the same cache itself. The others' policies need one that appends in place too.
    cache: dict[str, Any] = {}
    if not isinstance(policy, Delta):
        cache["past_key_values"] = DeltaCache(model.config)
    with policy.decoding(model), torch.inference_mode():
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, num_beams=1,
            pad_token_id=pad, stopping_criteria=StoppingCriteriaList([_Ticker(on_step)]),
            logits_processor=LogitsProcessorList([] if forcing is None else [forcing]), **cache,
        )  # fmt: skip
    written: Tensor = output[:, ids.shape[1] :].cpu()
    return written


def solve_batch(
    model: Any,
    tokenizer: Any,
    policy: Policy,
    batch: Sequence[Encoded],
    on_step: OnStep,
    *,
    keep_outputs: bool,
) -> list[dict[str, Any]]:
    """Generate answers and check them; a record for each sample.

    A record holds ``seed``, ``score``, ``answer``, ``tokens`` (new ones, the end token included),
    ``ended``, ``first_wrong`` (place of the first token that differs from the reference, None if
    none does or there is no reference), ``hash`` of the new tokens, ``prompt`` tokens, what
    :func:`reads` says and, with ``keep_outputs``, the ``text``.
    """
    steps = max(item.max_new_tokens for item in batch)
    output = new_tokens(model, tokenizer, policy, batch, steps, on_step)
    counts = policy.counts([len(item.prompt) for item in batch], output.shape[1] - 1)
    ends = end_ids(model, tokenizer)
    records = []
    for row, item in enumerate(batch):
        new = output[row, : item.max_new_tokens].tolist()
        stop = next((place for place, token in enumerate(new) if token in ends), None)
        new = new if stop is None else new[: stop + 1]
        text = tokenizer.decode(new, skip_special_tokens=True)
        verdict = item.sample.check(text)
        record = {
            "seed": item.sample.seed,
            "score": verdict.score,
            "answer": verdict.answer,
            "tokens": len(new),
            "ended": stop is not None,
            "first_wrong": first_difference(new, item.reference),
            "hash": hashlib.sha256(np.asarray(new, dtype=np.int64).tobytes()).hexdigest()[:16],
            "prompt": len(item.prompt),
            **reads(counts, row, len(item.prompt), len(new) - 1),
        }
        records.append({**record, "text": text} if keep_outputs else record)
    return records


def teacher_forced_batch(
    model: Any,
    tokenizer: Any,
    policy: Policy,
    batch: Sequence[Encoded],
    continuation: Tensor,
    on_step: OnStep,
) -> list[dict[str, Any]]:
    """Make a policy write ``continuation`` [B, steps], what full attention wrote; teacher forcing.

    A record holds ``nll``, the mean negative log-probability of a token; ``score``, the share of
    tokens that the policy would have written itself; ``first_wrong``, the first place where it
    would not. The first token, which prefill gives, is left out of all.
    """
    forcing = _TeacherForcing(continuation.to(model.device))
    steps = continuation.shape[1]
    new_tokens(model, tokenizer, policy, batch, steps, on_step, forcing)
    counts = policy.counts([len(item.prompt) for item in batch], steps - 1)
    log_probs = torch.stack(forcing.log_probs, dim=1).double().cpu()
    agrees = (torch.stack(forcing.best, dim=1).cpu() == continuation)[:, 1:]
    ends = end_ids(model, tokenizer)
    records = []
    for row, item in enumerate(batch):
        tokens = continuation[row].tolist()
        stop = next((place for place, token in enumerate(tokens) if token in ends), steps - 1)
        used = max(stop, 1)  # decode steps up to the end token
        agreed = agrees[row, :used]
        wrong = (~agreed).nonzero()
        records.append(
            {
                "seed": item.sample.seed,
                "score": float(agreed.double().mean()),
                "nll": float(-log_probs[row, 1 : used + 1].mean()),
                "tokens": used + 1,
                "first_wrong": int(wrong[0]) + 1 if len(wrong) else None,
                "prompt": len(item.prompt),
                **reads(counts, row, len(item.prompt), used),
            }
        )
    return records


def forced_log_probs(
    model: Any, tokenizer: Any, policy: Policy, ids: Sequence[int], context: int, on_step: OnStep
) -> Tensor:
    """Log-probabilities [R, V] float32 of a text's decode steps, one step after the other.

    As :class:`deltadecode.lab.rows.RowsText` gives them at once: ``context`` tokens are the prompt,
    and the R behind them are decoded; the last of ``ids`` [context + R + 1] is only predicted.
    Raises EvaluationError where the text holds the token that ends one.
    """
    forcing = _TeacherForcing(torch.tensor([ids[context:]], device=model.device), whole=True)
    steps = len(ids) - context
    prompt = [unchecked(ids[:context], steps)]
    new_tokens(model, tokenizer, policy, prompt, steps, on_step, forcing)
    if len(forcing.log_probs) < steps:
        raise EvaluationError(
            f"the text holds the token that ends a text, {len(forcing.log_probs)} tokens behind "
            f"its context of {context}, and policy {policy.name!r} cannot decode past it"
        )
    return torch.cat(forcing.log_probs[1:])


def reads(counts: Any, row: int, prompt: int, steps: int) -> dict[str, float]:
    """What a row read and kept in its own decode steps; those after its end do not count.

    ``read`` and ``metadata`` are sums over the steps, ``full`` is that of full attention, ``kept``
    is the most at any step; all are means over the full-attention layers.
    """
    lengths = prompt + np.arange(1, steps + 1)
    return {
        "read": round(float(counts.read[:steps, row].sum()), 2),
        "full": int(lengths.sum()),
        "kept": round(float(counts.kept[:steps, row].max(initial=0.0)), 2),
        "metadata": round(float(counts.metadata[:steps, row].sum()), 2),
    }


def first_difference(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """First place where a text departs from its reference; None if it does not, or has none."""
    if not reference:
        return None
    for place, expected in enumerate(reference):
        if place >= len(tokens) or tokens[place] != expected:
            return place
    return None if len(tokens) == len(reference) else len(reference)
