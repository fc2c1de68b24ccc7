"""Whole prompts through the model in chunks, and what each cache takes for them."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory.caches import NO_ROOM, OURS, WARMUP, Kind, free_all, held_bytes, reason
from benchmarks.memory.rows import left_out
from deltadecode.lab.results import rounded, row

PROMPT_UNIT = "s a prompt"


class _Clock:
    """A streamer of ``generate`` that notes when each token has come to the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        """Called with the prompt, and then with each token, which is on the host by now."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called behind the last token."""


def prompt_of(bench: Any, kind: Kind, tokens: int) -> dict[str, Any]:
    """Decode behind a prompt of random tokens, one sequence; ``why`` where that does not fit.

    ``bench`` has the model, a :class:`benchmarks.memory.run.Bench`.
    Else seconds until the first new token, the median step behind it in ms, the most bytes that the
    GPU had allocated, weights included, and those that the cache holds on the host.
    """
    free_all()
    why = kind.refused(1, tokens, bench.device)
    if why is not None:
        return {"why": why}
    bench.switch(kind)
    cuda = bench.device.type == "cuda"
    ids = torch.randint(bench.options.shape.vocabulary, (1, tokens), device=bench.device)
    clock = _Clock()
    try:
        cache = kind.make(bench.config, bench.device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        bench.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, streamer=clock,
            prefill_chunk_size=bench.options.prompt_chunk, do_sample=False, eos_token_id=None,
            pad_token_id=0, max_new_tokens=1 + WARMUP + bench.options.steps,
        )  # fmt: skip
        steps = [1e3 * (b - a) for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
        held = held_bytes(cache, bench.device)
        return {
            "seconds": clock.times[1] - began, "step_ms": rounded(median(steps[WARMUP:])),
            "gpu_peak": torch.cuda.max_memory_allocated() if cuda else 0,
            "gpu_bytes": held.gpu, "host_bytes": held.host,
        }  # fmt: skip
    except NO_ROOM as error:
        return {"why": reason(error)}
    finally:
        cache = None
        free_all()


def prompt_rows(bench: Any, tokens: int) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows of one length, each of another cache beside the offloaded one; and what was left out."""
    chunk = bench.options.prompt_chunk
    case = f"a prompt of {tokens:,} tokens in chunks of {chunk:,}"
    found = {kind.name: prompt_of(bench, kind, tokens) for kind in bench.kinds}
    ours = found[OURS]
    rows = []
    for name, theirs in found.items():
        if name == OURS or "why" in theirs or "why" in ours:
            continue
        sides = (("theirs", theirs), ("ours", ours))
        numbers = {
            f"{key}_{side}": one[key]
            for side, one in sides
            for key in ("step_ms", "gpu_peak", "gpu_bytes", "host_bytes")
        }
        rows.append(
            row(
                case, name, PROMPT_UNIT, ours["seconds"], theirs["seconds"], kind="prompt",
                tokens=tokens, chunk=chunk, **numbers,
            )
        )  # fmt: skip
    return rows, left_out(case, found)


def prompt_cells(row: dict[str, Any], side: str) -> tuple[str, ...]:
    """Cells of a table of prompts, behind the cache's name; a GB is 10^9 bytes."""
    gpu, host = (f"{row[f'{key}_{side}'] / 1e9:.1f} GB" for key in ("gpu_peak", "host_bytes"))
    return f"{row[side]:.1f}", f"{row[f'step_ms_{side}']:.1f}", gpu, host
