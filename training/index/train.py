"""Train small indexes of a frozen model, to choose the pages that its layers read.

    python training/index/train.py --model smollm2 --workdir RUN

All variants learn from the same passes of the model:

| variant | full layers | indexes |
|---|---|---|
| one | the first F | one, at layer F |
| four | the first F | four, from layer F on, evenly |
| placed | the first F | as four, at layer F and at DELTA's Δ-layers behind it |
| each | the first F | one in every other layer |
| replaced | DELTA's dense layers | one in the place of each of DELTA's Δ-layers |

``one-max``, ``four-max`` and ``replaced-max`` learn the largest weight over layers and heads, the
others the mean. F is how many layers DELTA's plan reads in full, so all but ``replaced`` read as
much as DELTA.
A killed run goes on from its last checkpoint with the same command.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deltadecode.architecture import kv_heads, num_layers, text_config
from deltadecode.config import DeltaConfig
from deltadecode.lab.policies.base import Layout
from index.data import KINDS, Rows
from index.model import Index, IndexConfig, Observation, index_loss, observe

WARMUP_STEPS = 10
NEWEST = 32  # last tokens of a row that are always asked for: answers stand there


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", required=True, help="folder or name of a model")
    p.add_argument("--workdir", type=Path, required=True, help="checkpoints and log go here")
    p.add_argument("--stop-after", type=float, help="stop after so many minutes; run again")
    p.add_argument("--kinds", default="docs,code,needle", help=f"of rows: {', '.join(KINDS)}")
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--rows", type=int, default=4, help="of a step")
    p.add_argument("--length", type=int, default=4096)
    p.add_argument("--queries", type=int, default=512, help="of a row that the loss is taken of")
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--rotary", type=int, default=32, help="channels that rotate with the position")
    p.add_argument("--lr", type=float, default=5e-3)
    p.add_argument("--repeats", type=int, default=1, help="updates from the same rows")
    p.add_argument("--variant", action="append", help="NAME=LAYER+LAYER: others than the four")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dtype", help="default: bfloat16 on a GPU, else float32")
    p.add_argument("--device", default="auto")
    return p.parse_args()


def variants(model: Any, plan: DeltaConfig, given: list[str] | None) -> dict[str, tuple[int, ...]]:
    """Sources by name of variant; a name that ends in -max says the target."""
    if given:
        named = (text.partition("=") for text in given)
        return {name: tuple(map(int, layers.split("+"))) for name, _, layers in named}
    layers = Layout.of(model).layers
    full = len(plan.dense_layers) + len(plan.delta_layers)
    step = (len(layers) - full) / 4
    found = {
        "one": layers[full : full + 1],
        "four": tuple(sorted({layers[full + int(i * step)] for i in range(4)})),
        "placed": (layers[full], *(i for i in plan.delta_layers if i > layers[full])),
        "each": layers[full:],
        "replaced": plan.delta_layers,
    }
    return found | {f"{name}-max": found[name] for name in ("one", "four", "replaced")}


def forced(queries: Tensor, tokens: int, plan: DeltaConfig) -> Tensor:
    """[Q, tokens] bool: what a plan's sink and recent pages read at each query."""
    page = torch.arange(tokens, device=queries.device) // plan.page_size
    newest = (queries // plan.page_size)[:, None]
    return (page < plan.sink_pages) | (page > newest - plan.recent_pages)


class Training:
    """Indexes, their optimizers and where they are, with a checkpoint."""

    def __init__(self, args: argparse.Namespace, model: Any, tokenizer: Any) -> None:
        self.args, self.model = args, model.eval().requires_grad_(False)
        self.plan = DeltaConfig.for_model(model)
        self.layers = num_layers(text_config(model))
        self.rows = Rows(tokenizer, tuple(args.kinds.split(",")), args.length, args.seed)
        config = text_config(model)
        heads = config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.indexes: dict[str, Index] = {}
        for name, sources in variants(model, self.plan, args.variant).items():
            torch.manual_seed(args.seed)  # whatever else is trained
            shape = IndexConfig(
                sources, config.hidden_size, args.width, args.rotary,
                token=2 * dim * (kv_heads(config) or heads),
                target="max" if name.endswith("-max") else "mean",
            )  # fmt: skip
            self.indexes[name] = Index(shape).to(model.device)
        # One optimizer: what an index learns has no part in another's gradient.
        self.optimizer = torch.optim.Adam(
            [p for index in self.indexes.values() for p in index.parameters()], args.lr, (0.9, 0.95)
        )
        self.step = 0
        self.path = args.workdir / "training.pt"
        if self.path.exists():
            saved = torch.load(self.path, map_location="cpu")
            for name, index in self.indexes.items():
                index.load_state_dict(saved["indexes"][name])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step = saved["step"]

    def queries(self, i: int, tokens: int) -> Tensor:
        """[Q] int64, ascending: the newest tokens of row i, and others behind the first eighth."""
        random = torch.Generator().manual_seed(self.args.seed * 1_000_003 + i)
        first = tokens // 8
        some = torch.randperm(tokens - first, generator=random)[: self.args.queries] + first
        newest = torch.arange(max(first, tokens - NEWEST), tokens)
        return torch.cat([some, newest]).unique().to(self.model.device)

    def train_step(self) -> dict[str, float]:
        """Losses on rows that were not seen before; then learn from them."""
        seen = [self.observed(self.step * self.args.rows + row) for row in range(self.args.rows)]
        done = self.step / self.args.steps
        rate = min(1.0, (self.step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * done))
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * rate
        found: dict[str, float] = {}
        for _ in range(self.args.repeats):
            losses = {name: self.update(index, seen) for name, index in self.indexes.items()}
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            found = found or {name: float(loss) for name, loss in losses.items()}
        self.step += 1
        return found

    def observed(self, i: int) -> tuple[Observation, Tensor]:
        """What the model does with row i, and what its queries read anyway."""
        sources = {layer for index in self.indexes.values() for layer in index.config.sources}
        ids = self.rows.row(i).to(self.model.device)
        queries = self.queries(i, len(ids))
        return observe(self.model, ids, queries, sources), forced(queries, len(ids), self.plan)

    def update(self, index: Index, seen: list[tuple[Observation, Tensor]]) -> Tensor:
        """Mean loss of an index, whose gradients are left clipped."""
        total = torch.zeros((), device=self.model.device)
        for one, out in seen:
            loss = index_loss(index, one, out, self.layers) / len(seen)
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(index.parameters(), 1.0)
        return total

    def save(self) -> None:
        """Write the checkpoint in one piece."""
        state = {
            "indexes": {name: index.state_dict() for name, index in self.indexes.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        torch.save(state, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)

    def train(self, until: float) -> bool:
        """Train to the end or the deadline; whether it is the end."""
        start = said = kept = time.monotonic()
        while self.step < self.args.steps:
            found = self.train_step()
            now = time.monotonic()
            if self.step in (1, self.args.steps) or now - said > 10 or now > until:
                self.say(step=self.step, seconds=round(now - start, 1),
                         **{name: round(x, 4) for name, x in found.items()})  # fmt: skip
                said = now
            if now - kept > 60 or now > until or self.step == self.args.steps:
                self.save()
                kept = now
            if now > until and self.step < self.args.steps:
                return False
        for name, index in self.indexes.items():
            index.save(self.args.workdir / f"{name}.pt", args=str(vars(self.args)))
        return True

    def say(self, **line: object) -> None:
        """Print a line, and keep it in the log."""
        print(json.dumps(line), flush=True)
        with (self.args.workdir / "log.jsonl").open("a") as log:
            print(json.dumps(line), file=log)


def main() -> None:
    from deltadecode.cli.loading import find_device, load_model, load_tokenizer, resolve_model

    args = parse()
    until = time.monotonic() + 60 * (args.stop_after or 1e9)
    args.workdir.mkdir(parents=True, exist_ok=True)
    folder, device = resolve_model(args.model), find_device(args.device)
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    model, tokenizer = load_model(folder, dtype, device), load_tokenizer(folder)
    if not Training(args, model, tokenizer).train(until):
        sys.exit("out of time; the same command goes on from here")


if __name__ == "__main__":
    main()
