"""What Δ-layers select from step to step: recorded from a real model, and replayed by a walk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import deltadecode as dd
from benchmarks.lossless.run import make_prompts
from benchmarks.report import Progress
from deltadecode.engines.transformers.offload_host import Transfer
from deltadecode.engines.transformers.planned import PlannedKernels
from deltadecode.lab.results import row
from deltadecode.lab.tasks.text import Text

_CHUNK = 2048  # tokens of a prompt that are read at a time
_SHIFT = 37  # steps that a batch's rows are apart in the same record


class RecordingCache(dd.DeltaOffloadedCache):
    """An offloaded cache on a simulated device that keeps what each Δ-layer fetched.

    Attributes
    ----------
    missed : dict
        Δ-layer -> pages that each of its sparse layers fetched, one number a step.
    """

    def __init__(self, config: Any, cfg: dd.DeltaConfig) -> None:
        super().__init__(config, cfg, transfer=Transfer())
        self.missed: dict[int, list[int]] = {}

    def request(self, source: int, *arguments: Any) -> Any:
        """Fetch, and note how many pages."""
        fetch = super().request(source, *arguments)
        if fetch is not None:
            self.missed.setdefault(source, []).append(int(fetch.missing))
        return fetch


@torch.inference_mode()
def record(
    model: Any,
    tokenizer: Any,
    plans: Sequence[dd.DeltaConfig],
    contexts: Sequence[int],
    *,
    texts: int,
    steps: int,
    file: str = "",
    progress: Progress = lambda case, done: None,
) -> list[dict[str, Any]]:
    """Pages that were fetched while real texts were read token by token, one row a piece and plan.

    Without a file they are those of ``python -m benchmarks.lossless``. The pool is that of
    :class:`DeltaOffloadedCache`. ``missed`` has a list for each Δ-layer, with the pages that a
    sparse layer of it fetched at each step; the first step, which fetches all, is left out.
    """
    rows: list[dict[str, Any]] = []
    parts = len(contexts) * texts * len(plans)
    for context in contexts:
        for number, ids in enumerate(pieces_of(tokenizer, context + steps + 1, texts, file)):
            for cfg in plans:
                case = f"context {context}, text {number}: K {cfg.budget_pages}"
                progress(case, len(rows) / parts)
                dd.enable(model, cfg)
                cache = RecordingCache(model.config, cfg)
                for start in range(0, context, _CHUNK):
                    chunk = ids[:, start : min(start + _CHUNK, context)]
                    model(chunk, past_key_values=cache, logits_to_keep=1)
                for step in range(context, context + steps + 1):
                    model(ids[:, step : step + 1], past_key_values=cache)
                missed = [fetched[1:] for _, fetched in sorted(cache.missed.items())]
                rows.append(record_row(context, number, cfg, missed, Path(file).stem or "text"))
    dd.disable(model)
    return rows


def pieces_of(tokenizer: Any, tokens: int, texts: int, file: str) -> list[Tensor]:
    """Token ids [1, tokens or more] of pieces of a file, or of the texts of lossless mode."""
    if not file:
        return make_prompts(tokenizer, tokens, texts, 1)
    task = Text(file=file, context=tokens, tokens=1)
    return [torch.tensor([piece]) for piece in task.pieces(tokenizer, range(texts))]


def record_row(
    context: int, number: int, cfg: dd.DeltaConfig, missed: list[list[int]], text: str
) -> dict[str, Any]:
    """One row of a record, from :attr:`RecordingCache.missed`."""
    mean = float(np.mean(missed))
    read = cfg.budget_pages
    return row(
        f"{text} {number}, context {context}, K {read} of {cfg.page_size} tokens",
        "no pool", "pages fetched a step by a sparse layer", max(mean, 1e-9), read,
        context=context, text=text, number=number, page_size=cfg.page_size, budget_pages=read,
        recent_pages=cfg.recent_pages, sink_pages=cfg.sink_pages,
        hit_rate=round(1 - mean / read, 4), missed=missed,
    )  # fmt: skip


def load_record(path: Path, plan: dd.DeltaConfig) -> dict[str, Any]:
    """The row of a record that a plan is measured with.

    The longest context with the plan's pages and K, and of its texts the one with most fetches. A
    ValueError where there is none, or no result.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        why = getattr(error, "strerror", None) or "no rows can be read from it"
        raise ValueError(
            f"--selections must be a result of --record, got {str(path)!r}: {why}"
        ) from error
    same = [
        one
        for one in rows
        if "missed" in one
        and (one["page_size"], one["budget_pages"]) == (plan.page_size, plan.budget_pages)
    ]
    if not same:
        raise ValueError(
            f"--selections must have a record of {plan.budget_pages} pages of {plan.page_size} "
            f"tokens, got none in {path.name}"
        )
    longest = max(one["context"] for one in same)
    found: dict[str, Any] = min(
        (one for one in same if one["context"] == longest), key=lambda one: one["hit_rate"]
    )
    return found


class Walk:
    """Selections that change by as many pages a step as a record's did.

    At each step a Δ-layer of every row drops the pages that it has held longest, and takes as many
    as its record says, which it has not read for as long as there are others. So each of them is
    fetched. Recent and sink pages are as the rules have them. The scores are still computed, and
    pages selected by them: only what comes out is replaced.

    Parameters
    ----------
    missed : sequence of sequence of int
        Pages to change, for each Δ-layer and step: of more layers than there are the last ones,
        which fetch most. Read in circles, row by row of a batch from another place.
    first : int
        Tokens in the cache at the first step, the new one included.
    """

    def __init__(
        self,
        missed: Sequence[Sequence[int]],
        cfg: dd.DeltaConfig,
        *,
        layers: int,
        batch: int,
        first: int,
        steps: int,
        device: torch.device,
    ) -> None:
        self._layers, self._calls = layers, 0
        shape = layers, steps, batch, cfg.budget_pages
        ids = np.empty(shape, dtype=np.int32)
        for layer in range(layers):
            for member in range(batch):
                changes = np.roll(missed[(layer - layers) % len(missed)], -_SHIFT * member)
                random = np.random.default_rng((layer, member))
                ids[layer, :, member] = _walk(changes, cfg, first, steps, random)
        self._ids = torch.from_numpy(ids).to(device)

    def __call__(self, ids: Tensor) -> Tensor:
        """Selection in the place of the next one, [B, K] int32."""
        step, layer = divmod(self._calls, self._layers)
        self._calls += 1
        assert ids.shape == self._ids.shape[2:], "a walk is for one group of rows, without a share"
        return self._ids[layer, step]

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Let it replace the selections of every Δ-layer."""
        attend = PlannedKernels.attend

        def replaced(*arguments: Any, **named: Any) -> Any:
            out, selection = attend(*arguments, **named)
            if selection is None:
                return out, None
            return out, (self(selection[0]), selection[1])

        with patch.object(PlannedKernels, "attend", replaced):
            yield


def _walk(
    changes: np.ndarray, cfg: dd.DeltaConfig, first: int, steps: int, random: np.random.Generator
) -> np.ndarray:
    """[steps, K] page ids, ascending."""
    pages = -(-first // cfg.page_size)
    sinks, free = cfg.sink_pages, cfg.budget_pages - cfg.recent_pages - cfg.sink_pages
    # Pages that become recent in these steps, or are, are not among the others.
    order = sinks + random.permutation(pages - sinks - cfg.recent_pages)
    taken, walked = free, np.empty((steps, cfg.budget_pages), dtype=np.int32)
    for step in range(steps):
        if step:
            taken += min(int(changes[(step - 1) % len(changes)]), free)
        last = -(-(first + step) // cfg.page_size)
        walked[step] = np.sort(
            np.concatenate(
                [
                    np.arange(sinks),
                    order[np.arange(taken - free, taken) % len(order)],
                    np.arange(last - cfg.recent_pages, last),
                ]
            )
        )
    return walked
