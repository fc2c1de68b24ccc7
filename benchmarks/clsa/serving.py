"""The three modes in vLLM: prompts and decode steps of its engine, timed one by one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.e2e.workloads import reading_steps
from benchmarks.processes import Process
from deltadecode.errors import ArgumentError
from deltadecode.models.clsa import ClsaConfig

WORKER = (sys.executable, "-m", "benchmarks.clsa.engine")
_REPEATS = 3
_MEMORY_SHARE = 0.9
# Steps before the timed ones, and what is in flight when they end.
_SPARE = 8


class Served:
    """An engine of one mode.

    Raises :class:`benchmarks.processes.WorkerError` when it does not start.
    """

    def __init__(
        self,
        config: ClsaConfig,
        contexts: Sequence[int],
        batches: Sequence[int],
        eager: bool,
        worker: Sequence[str] = WORKER,
    ) -> None:
        self.config = config
        self._folder = TemporaryDirectory(prefix="deltadecode-")
        config.architectures = ["ClsaForCausalLM"]
        config.max_position_embeddings = max(contexts) + _written(max(batches), max(contexts))
        config.save_pretrained(Path(self._folder.name))
        spec = {
            "model": self._folder.name, "batch": max(batches), "eager": eager,
            "longest": config.max_position_embeddings, "memory_share": _MEMORY_SHARE,
            "vocabulary": config.vocab_size,
        }  # fmt: skip
        self._process = Process(config.mode, spec, worker)
        self.facts: dict[str, Any] = self._process.ready()

    def stop(self) -> None:
        """End the engine."""
        self._process.stop()
        self._folder.cleanup()

    def prefill_seconds(self, tokens: int) -> float:
        """Seconds of a prompt, to its first new token: the median of a few, after one."""
        command = {"do": "decode", "batch": 1, "prompt": tokens, "new_tokens": 1}
        seconds: list[float] = [self._process.do(command)["seconds"] for _ in range(_REPEATS + 1)]
        return median(seconds[1:])

    def step_seconds(self, batch: int, context: int, steps: int) -> float | None:
        """Median seconds of a decode step near the end of a context; None if it does not fit."""
        if batch * blocks(self.config, context, self.facts["block_size"]) > self.facts["blocks"]:
            return None
        prompt = context - steps
        self._process.do(
            {"do": "fill", "batch": batch, "prompt": prompt,
             "new_tokens": steps + _written(batch, prompt)}
        )  # fmt: skip
        timed = self._process.do({"do": "steps", "steps": steps})
        self._process.do({"do": "drop"})
        if timed["preemptions"]:
            raise ArgumentError(f"a batch of {batch} with {context} tokens did not fit in vLLM")
        seconds: list[float] = timed["seconds"]
        return median(seconds)


def _written(batch: int, prompt: int) -> int:
    """Tokens that a row may write beside the timed ones: the first write while others are read."""
    return reading_steps(batch, prompt) + _SPARE


def blocks(config: ClsaConfig, tokens: int, block_size: int) -> int:
    """Blocks of vLLM's memory that a sequence takes: each of one layer, in a Transformer of all."""
    full = -(-tokens // block_size)
    if config.mode == "transformer":
        return full
    window = min(tokens, config.sliding_window + block_size)
    taken = full + config.self_layers * (1 - (-window // block_size))
    if config.mode == "clsa":
        width = 2 * config.num_key_value_heads * config.head_dim // config.index_head_dim
        taken += -(-tokens // (block_size * width))
    return taken
