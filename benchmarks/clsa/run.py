"""Prefill, decoding and end to end of the three modes, and where the time of a step goes.

Weights are random, and so is what stands in the caches of a decode step: neither changes the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.clsa.serving import Served
from benchmarks.kernels.timing import Call, GraphTimer
from deltadecode import ops
from deltadecode.cli.loading import find_device
from deltadecode.errors import ArgumentError
from deltadecode.lab.results import result, rounded, row
from deltadecode.models.clsa import ClsaCache, ClsaConfig, ClsaForCausalLM, ClsaStaticCache
from deltadecode.models.clsa.configuration import MODES
from deltadecode.ops.tokens import selection

__all__ = ["MODES", "Task", "run"]
_SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 32,
    "index_topk": 64, "index_head_dim": 32,
}  # fmt: skip
_REPEATS = 3
# Share of the free memory that a cache may take; a step needs some, too.
_FULL = 0.8


@dataclass(frozen=True)
class Task:
    """What is measured; see the command line."""

    contexts: list[int]
    modes: list[str]
    batches: list[int]
    new_tokens: int
    steps: int
    small: bool
    device: str
    vllm: bool = False

    def check(self) -> None:
        """Refuse what cannot be measured, in one line."""
        for mode in self.modes:
            if mode not in MODES:
                raise ArgumentError(f"--mode must be one of {', '.join(MODES)}, got {mode!r}")
        if min(self.contexts) <= self.new_tokens or min(self.contexts) < 2 * self.steps:
            raise ArgumentError(
                f"--context must exceed --new-tokens {self.new_tokens} and twice --steps "
                f"{self.steps}, got {min(self.contexts)}"
            )
        if self.vllm:
            return
        find_device(self.device)


@dataclass(frozen=True)
class Cell:
    """One mode at one context; rates in tokens per second."""

    prefill: float
    decode: float
    batch: int
    step_ms: float
    kv_bytes: float
    tried: dict[int, float]

    def end_to_end(self, context: int, new: int) -> float:
        """Tokens in and out per second, of a batch that prefills row by row and then decodes."""
        seconds = self.batch * (context - new) / self.prefill + new * self.step_ms / 1000
        return self.batch * context / seconds

    def written(self, context: int, new: int) -> float:
        """New tokens per second of the same."""
        return self.end_to_end(context, new) * new / context


def run(command: str, task: Task, progress: Callable[..., None]) -> dict[str, Any]:
    """Measure all cells; rows have the time of a token, of CLSA and of each other mode."""
    cells: dict[tuple[str, int], Cell] = {}
    layers: dict[str, Any] = {}
    engines: dict[str, Any] = {}
    total, done = len(task.modes) * len(task.contexts), 0
    for mode in task.modes:
        if task.vllm:
            progress(f"{mode} in vLLM", done / total)
            served, engines[mode] = _served(task, mode)
            cells |= {(mode, context): cell for context, cell in served.items()}
            done += len(task.contexts)
            continue
        torch.manual_seed(0)
        model = _model(task, mode)
        for context in task.contexts:
            progress(f"{mode}, {context} tokens", done / total)
            cells[mode, context] = _cell(model, task, context)
            if mode == "clsa":
                layers[str(context)] = _layer(model, task, context, cells[mode, context].batch)
            done += 1
        del model
        _free(task)
    made = result("clsa", command, _rows(task, cells))
    made["cells"] = [
        {"mode": mode, "context": context, "new_tokens": task.new_tokens,
         "prefill_tokens_per_s": rounded(cell.prefill), "batch": cell.batch,
         "decode_tokens_per_s": rounded(cell.decode), "step_ms": rounded(cell.step_ms),
         "end_to_end_new_tokens_per_s": rounded(cell.written(context, task.new_tokens)),
         "kv_bytes_per_token": rounded(cell.kv_bytes),
         "decode_by_batch": {str(b): rounded(rate) for b, rate in cell.tried.items()}}
        for (mode, context), cell in cells.items()
    ]  # fmt: skip
    if task.vllm:
        made["engines"] = engines
    else:
        made["layer_ms"] = layers
    return made


def _config(task: Task, mode: str) -> ClsaConfig:
    shape = _SMALL if task.small else {}
    return ClsaConfig(mode=mode, max_position_embeddings=max(task.contexts), **shape)


def _served(task: Task, mode: str) -> tuple[dict[int, Cell], dict[str, Any]]:
    """Cells of one mode in vLLM, by context, and what its engine ran with."""
    engine = Served(_config(task, mode), task.contexts, task.batches, eager=task.small)
    found = {}
    try:
        for context in task.contexts:
            tokens = context - task.new_tokens
            prefill = tokens / engine.prefill_seconds(tokens)
            tried: dict[int, float] = {}
            for batch in sorted(task.batches):
                seconds = engine.step_seconds(batch, context, task.steps)
                if seconds is None:
                    break
                tried[batch] = batch / seconds
            found[context] = _best(prefill, tried, _kv_bytes(engine.config, 2), context)
    finally:
        engine.stop()
    return found, engine.facts


def _best(prefill: float, tried: dict[int, float], kv_bytes: float, context: int) -> Cell:
    """The cell of the batch with the highest rate; ``tried`` has tokens a second by batch."""
    if not tried:
        raise ArgumentError(f"no batch fits the device's memory at a context of {context} tokens")
    best = max(tried, key=lambda batch: tried[batch])
    return Cell(prefill, tried[best], best, 1000 * best / tried[best], kv_bytes, tried)


def _model(task: Task, mode: str) -> ClsaForCausalLM:
    config = _config(task, mode)
    before, dtype = torch.get_default_dtype(), torch.bfloat16
    torch.set_default_dtype(dtype if task.device.startswith("cuda") else torch.float32)
    try:
        with torch.device(task.device):
            model: ClsaForCausalLM = ClsaForCausalLM(config).eval()
            return model
    finally:
        torch.set_default_dtype(before)


@torch.inference_mode()
def _cell(model: ClsaForCausalLM, task: Task, context: int) -> Cell:
    prompt = torch.randint(model.config.vocab_size, (1, context - task.new_tokens)).to(task.device)

    def prefill() -> None:
        model(prompt, past_key_values=ClsaCache(model.config), logits_to_keep=1)

    seconds = _seconds(prefill, task)
    tried: dict[int, float] = {}
    kv_bytes = _kv_bytes(model.config, model.dtype.itemsize)
    for batch in sorted(task.batches):
        _free(task)
        if task.device.startswith("cuda"):
            free = torch.cuda.mem_get_info()[0]
            if kv_bytes * batch * context > _FULL * free:
                break
        tried[batch] = batch / _step_seconds(model, task, batch, context)
    return _best(prompt.shape[1] / seconds, tried, kv_bytes, context)


def _step_seconds(model: ClsaForCausalLM, task: Task, batch: int, context: int) -> float:
    """Seconds of a decode step near the end of the context."""
    cache = ClsaStaticCache(model.config, batch, context, model.dtype, model.device)
    for x in (*cache.windows, cache.shared, cache.index):
        if x is not None:
            x.normal_()
    ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)

    def steps() -> None:
        cache.seen = context - task.steps
        cache.lengths.fill_(cache.seen)
        for _ in range(task.steps):
            model(ids, past_key_values=cache)

    return _seconds(steps, task) / task.steps


def _kv_bytes(config: ClsaConfig, itemsize: int) -> float:
    """Bytes that one more token of the context takes in the cache."""
    heads = 2 * config.num_key_value_heads * config.head_dim * itemsize
    if config.mode == "transformer":
        return float(heads * config.num_hidden_layers)
    return float(heads + (config.index_head_dim * itemsize if config.mode == "clsa" else 0))


@torch.inference_mode()
def _layer(model: ClsaForCausalLM, task: Task, context: int, batch: int) -> dict[str, float]:
    """Milliseconds of the parts of a step: of a cross layer, and of the index, once a step."""
    config = model.config

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=model.dtype, device=model.device)

    x = randn(batch, 1, config.hidden_size)
    k, v = randn(2, batch, context, config.num_key_value_heads, config.head_dim)
    keys, query = randn(batch, context, config.index_head_dim), randn(batch, config.index_head_dim)
    q = randn(batch, config.num_attention_heads, config.head_dim)
    table = torch.arange(batch, dtype=torch.int32, device=model.device)[:, None]
    lengths = torch.full((batch,), context, dtype=torch.int32, device=model.device)
    scores = ops.index_scores(query, keys, table, lengths)
    ids, counts = ops.select_pages(scores, lengths, selection(config.index_topk))
    layer: Any = model.model.layers[-1]
    given: dict[str, Any] = {"scale": config.head_dim**-0.5, "page_size": 1}
    sparse = {**given, "page_ids": ids, "page_counts": counts}
    weights = sum(weight.nbytes for weight in layer.mlp.parameters())
    read = ids.shape[1] * (k.nbytes + v.nbytes) // context
    # Each with the bytes that it reads, about.
    parts: dict[str, tuple[Call, int]] = {
        "ffn": (lambda: layer.mlp(layer.post_attention_layernorm(x)), weights),
        "attention_sparse": (
            lambda: ops.decode_attention(q, k, v, table, lengths, **sparse), read,
        ),
        "attention_dense": (
            lambda: ops.decode_attention(q, k, v, table, lengths, **given), k.nbytes + v.nbytes,
        ),
        "index_scores": (lambda: ops.index_scores(query, keys, table, lengths), keys.nbytes),
        "top_k": (
            lambda: ops.select_pages(scores, lengths, selection(config.index_topk)), scores.nbytes,
        ),
        "top_k_of_torch": (
            lambda: scores.topk(min(config.index_topk, context)), scores.nbytes,
        ),
    }  # fmt: skip
    if not task.device.startswith("cuda"):
        return {name: rounded(1000 * _seconds(call, task)) for name, (call, _) in parts.items()}
    timer = GraphTimer()
    times = timer.measure(
        {name: timer.prepare([call], size) for name, (call, size) in parts.items()}
    )
    return {name: rounded(timing.us / 1000) for name, timing in times.items()}


def _seconds(call: Call, task: Task) -> float:
    """Median of a few calls, after one that compiles and captures."""
    on_gpu, taken = task.device.startswith("cuda"), []
    for turn in range(_REPEATS + 1):
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        if turn:
            taken.append(time.perf_counter() - start)
    return median(taken)


def _free(task: Task) -> None:
    if task.device.startswith("cuda"):
        torch.cuda.empty_cache()


def _rows(task: Task, cells: dict[tuple[str, int], Cell]) -> list[dict[str, Any]]:
    made = []
    for context in task.contexts:
        ours = cells.get(("clsa", context))
        for peer in ("transformer", "yoco"):
            theirs = cells.get((peer, context))
            if ours is None or theirs is None:
                continue
            new, unit = task.new_tokens, "µs a token"
            pairs = (
                ("prefill", unit, 1e6 / ours.prefill, 1e6 / theirs.prefill),
                ("decode", unit, 1e6 / ours.decode, 1e6 / theirs.decode),
                ("end to end", "µs a new token", 1e6 / ours.written(context, new),
                 1e6 / theirs.written(context, new)),
                ("cache", "bytes a token", ours.kv_bytes, theirs.kv_bytes),
            )  # fmt: skip
            for case, what, mine, others in pairs:
                made.append(
                    row(f"{case}, {context} tokens", peer, what, mine, others,
                        batches=[ours.batch, theirs.batch])
                )  # fmt: skip
    return made
