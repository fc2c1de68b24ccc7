"""Train the embedded model on chain problems.

    python training/train.py --workdir DIR --minutes 20

Continues from DIR's checkpoint when there is one. The learning rate and the mix of lengths follow
the minutes trained so far, so a training may be split over several runs with `--stop-after`.
Lengths start short: the longest length in use grows once the model has mastered the last one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from data import loader
from model import Llama, Shape
from optimizer import build_optimizers
from torch import Tensor

from deltadecode.lab.tasks.vocabulary import TOKENS

LENGTHS = (256, 512, 1024, 2048, 4096, 6400)
MASTERED = 0.99  # token accuracy on the longest length in use that admits the next one
DECAY = 0.4  # share of the training over which the learning rate falls to zero
WARMUP_STEPS = 100


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--workdir", type=Path, required=True, help="checkpoint and log go here")
    p.add_argument("--minutes", type=float, default=20.0, help="length of the whole training")
    p.add_argument("--stop-after", type=float, help="stop this run after so many minutes")
    p.add_argument("--max-steps", type=int, help="stop this run after so many steps")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch-tokens", type=int, default=98_304)
    p.add_argument("--muon-lr", type=float, default=0.01)
    p.add_argument("--adam-lr", type=float, default=2e-3)
    p.add_argument("--kv-heads", type=int, default=1)
    p.add_argument("--intermediate", type=int, default=512)
    p.add_argument("--layers", type=int, default=24)
    p.add_argument("--workers", type=int, default=3, help="data processes per length")
    p.add_argument("--device", default="cuda")
    p.add_argument("--no-compile", action="store_true")
    return p.parse_args()


class Mix:
    """Which length comes next, and its batches."""

    def __init__(self, seed: int, batch_tokens: int, workers: int, level: int) -> None:
        self.seed, self.batch_tokens, self.workers, self.level = seed, batch_tokens, workers, level
        self.loaders: dict[int, Iterator[tuple[Tensor, Tensor]]] = {}
        self.accuracy = dict.fromkeys(LENGTHS, 0.0)
        self.loss = dict.fromkeys(LENGTHS, 0.0)

    def next(self, step: int) -> tuple[int, tuple[Tensor, Tensor]]:
        """The length of this step, drawn with half the weight on the longest, and a batch."""
        draw = torch.rand((), generator=torch.Generator().manual_seed(self.seed * 7919 + step))
        level = self.level if draw < 0.5 else int((draw - 0.5) * 2 * (self.level + 1))
        length = LENGTHS[level]
        if length not in self.loaders:
            rows = max(1, self.batch_tokens // length)
            self.loaders[length] = loader(self.seed + step, rows, length, self.workers)
        return length, next(self.loaders[length])

    def record(self, length: int, loss: float, accuracy: float) -> None:
        """Smooth the figures of a length and admit the next length when it is time."""
        old = self.accuracy[length]
        self.accuracy[length] = 0.8 * old + 0.2 * accuracy if old else accuracy
        self.loss[length] = loss
        top = LENGTHS[self.level]
        if length == top and self.accuracy[top] > MASTERED and self.level + 1 < len(LENGTHS):
            self.level += 1


def head_loss(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and token accuracy over the solution's tokens."""
    logits = (x @ weight.to(x.dtype).T).float().flatten(0, 1)
    targets = targets.flatten()
    loss = F.cross_entropy(logits, targets, ignore_index=-100)
    counted = targets >= 0
    right = ((logits.argmax(-1) == targets) & counted).sum() / counted.sum()
    return loss, right


def rate(step: int, progress: float) -> float:
    """Learning-rate factor: linear warm-up, constant, linear fall to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.0, (1 - progress) / DECAY))


class Trainer:
    """Model, optimizers and counters, with their checkpoint."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.path = args.workdir / "checkpoint.pt"
        saved = torch.load(self.path, map_location="cpu") if self.path.exists() else None
        shape = (
            Shape(**saved["shape"])
            if saved
            else Shape(
                vocab_size=len(TOKENS),
                num_key_value_heads=args.kv_heads,
                intermediate_size=args.intermediate,
                num_hidden_layers=args.layers,
            )
        )
        self.model = Llama(shape)
        self.model.initialise(args.seed)
        if saved:
            self.model.load_state_dict(saved["model"])
        self.model.to(self.device)
        self.optimizers = build_optimizers(self.model, args.muon_lr, args.adam_lr)
        self.step, self.tokens, self.seconds, level = 0, 0, 0.0, 0
        if saved:
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                rates = [g["lr"] for g in optimizer.param_groups]
                optimizer.load_state_dict(state)
                for group, lr in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = lr
            self.step, self.tokens = saved["step"], saved["tokens"]
            self.seconds, level = saved["seconds"], saved["level"]
        self.base = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.mix = Mix(args.seed + 1000 * self.step, args.batch_tokens, args.workers, level)
        self.head = head_loss
        if not args.no_compile:
            torch._dynamo.config.cache_size_limit = 64
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
            self.head = torch.compile(head_loss, dynamic=False)

    def save(self) -> None:
        state = {
            "shape": asdict(self.model.shape),
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "level": self.mix.level,
        }
        torch.save(state, self.path)

    def train_step(self) -> tuple[int, Tensor, Tensor]:
        length, (ids, targets) = self.mix.next(self.step)
        ids = ids.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        factor = rate(self.step, self.seconds / 60 / self.args.minutes)
        for optimizer, rates in zip(self.optimizers, self.base, strict=True):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * factor
        # Processors without bfloat16 units crawl under autocast.
        on_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu):
            x = self.model.hidden(ids, torch.bfloat16 if on_gpu else torch.float32)
            loss, right = self.head(x, self.model.lm_head.weight, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += ids.numel()
        return length, loss.detach(), right

    def run(self) -> None:
        """Train until this run's or the whole training's time is up."""
        start, before = time.perf_counter(), self.seconds
        limit = 60 * min(self.args.stop_after or 1e9, self.args.minutes - before / 60)
        last_log, last_tokens, first_step = start, self.tokens, self.step
        pending: list[tuple[int, Tensor, Tensor]] = []
        log = (self.args.workdir / "log.jsonl").open("a")
        while True:
            pending.append(self.train_step())
            done = time.perf_counter() - start >= limit or (
                self.args.max_steps is not None and self.step - first_step >= self.args.max_steps
            )
            if len(pending) >= 10 or done:  # read results back rarely: each read waits
                for length, loss, right in pending:
                    self.mix.record(length, loss.item(), right.item())
                pending.clear()
            now = time.perf_counter()
            self.seconds = before + now - start
            if now - last_log > 10 or done:
                line = {
                    "seconds": round(self.seconds, 1),
                    "step": self.step,
                    "tokens": self.tokens,
                    "tokens_per_second": round((self.tokens - last_tokens) / (now - last_log)),
                    "loss": {k: round(v, 5) for k, v in self.mix.loss.items() if v},
                    "accuracy": {k: round(v, 5) for k, v in self.mix.accuracy.items() if v},
                }
                print(json.dumps(line), flush=True)
                print(json.dumps(line), file=log, flush=True)
                last_log, last_tokens = now, self.tokens
            if done:
                break
        self.save()


def main() -> None:
    args = parse()
    args.workdir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    Trainer(args).run()


if __name__ == "__main__":
    main()
