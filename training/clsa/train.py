"""Train CLSA, YOCO and a Transformer of one size on the same tokens, and compare them.

    python training/clsa/train.py --workdir RUN

Phases, in this order; each starts from the weights that the one before it has left:

| run | phases |
|---|---|
| transformer | dense (short rows), long (long rows) |
| yoco | dense, long |
| clsa | index (of yoco's dense weights; they are frozen), joint (long rows, sparse) |

In `index` the indexer alone learns the mean dense attention (KL). `joint` trains everything on
L_LM + 0.1 KL. In L_LM a token of an answer counts as much as several of text, which would drown the
few that are wrong. A killed run goes on from its last checkpoint with the same command.
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
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from optimizer import build_optimizers
from python_library import package_files

from clsa.data import VOCABULARY, Batches, Row, Rows, build_tokenizer, loader
from clsa.measure import measure
from deltadecode.models.clsa import ClsaConfig, ClsaForCausalLM
from deltadecode.models.clsa.configuration import MODES

PHASES = (
    ("transformer", "dense"), ("transformer", "long"), ("yoco", "dense"), ("yoco", "long"),
    ("clsa", "index"), ("clsa", "joint"),
)  # fmt: skip
KD = 0.1  # weight of the index's loss in the joint phase
KEEP_SECONDS = 60  # between checkpoints
WARMUP_STEPS = 50
DECAY = 0.6  # share of a long or joint phase over which the learning rate falls to zero
COMPILE = {"dynamic": False}  # shapes of a phase are static


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--workdir", type=Path, required=True, help="checkpoints and log go here")
    p.add_argument(
        "--stop-after", type=float, help="stop after so many minutes; run again to go on"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dense-tokens", type=float, default=20e6)
    p.add_argument("--index-tokens", type=float, default=3e6)
    p.add_argument("--long-tokens", type=float, default=70e6, help="of the long and joint phases")
    p.add_argument("--dense-length", type=int, default=512)
    p.add_argument("--length", type=int, default=4096)
    p.add_argument("--batch-tokens", type=int, default=65_536)
    p.add_argument("--rows-at-once", type=int, default=8, help="long rows of a forward pass")
    p.add_argument(
        "--answer-weight", type=float, default=4.0, help="of a token of an answer; text's is 1"
    )
    p.add_argument(
        "--packages", default="", help="installed packages whose sources are text, too: torch,numpy"
    )
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument(
        "--intermediate", type=int, default=832, help="of YOCO and CLSA; a Transformer's follows"
    )
    p.add_argument("--layers", type=int, default=16)
    p.add_argument("--kv-heads", type=int, help="default: as many as query heads, of 64")
    p.add_argument("--topk", type=int, default=256)
    p.add_argument("--window", type=int, default=128)
    p.add_argument("--muon-lr", type=float, default=0.01)
    p.add_argument("--adam-lr", type=float, default=2e-3)
    p.add_argument("--index-lr", type=float, default=2e-3)
    p.add_argument("--workers", type=int, default=8)
    p.add_argument("--samples", type=int, default=64, help="rows of each kind to measure on")
    p.add_argument("--device", default="cuda")
    p.add_argument(
        "--compile", action=argparse.BooleanOptionalAction,
        help="compile the layers; by default on CUDA only",
    )  # fmt: skip
    p.add_argument("--out", type=Path, help="folder for a result file")
    args = p.parse_args()
    if args.compile is None:
        args.compile = torch.device(args.device).type == "cuda"
    args.packages = tuple(name for name in args.packages.split(",") if name)
    try:
        for name in args.packages:
            package_files(name)
    except ValueError as error:
        p.error(str(error))
    return args


def make_config(args: argparse.Namespace, mode: str) -> ClsaConfig:
    """One shape for all modes, but that a Transformer has keys and values in every layer.

    Its MLP is narrower, by the multiple of 8 with which it comes nearest to CLSA's size.
    """
    if mode != "transformer":
        return _config(args, mode, args.intermediate)
    wanted = _parameters(_config(args, "clsa", args.intermediate))
    first, second = (_parameters(_config(args, mode, width)) for width in (8, 16))
    eights = 1 + round((wanted - first) / (second - first))
    return _config(args, mode, 8 * max(1, eights))


def _parameters(config: ClsaConfig) -> int:
    with torch.device("meta"):
        return ClsaForCausalLM(config).num_parameters()


def _config(args: argparse.Namespace, mode: str, intermediate: int) -> ClsaConfig:
    heads = args.hidden // 64
    return ClsaConfig(
        vocab_size=VOCABULARY, hidden_size=args.hidden, intermediate_size=intermediate,
        num_hidden_layers=args.layers, num_attention_heads=heads,
        num_key_value_heads=args.kv_heads or heads, head_dim=64, mode=mode,
        sliding_window=args.window,
        index_topk=args.topk, index_head_dim=64, max_position_embeddings=2 * args.length,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def compile_layers(model: ClsaForCausalLM) -> None:
    """Compile each layer in place; layers of a kind share what is compiled.

    All else stays eager: it runs once a pass, or its shapes change from batch to batch.
    """
    # What other phases have compiled would count against the limit of recompilations.
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(**COMPILE)


class OutOfTime(Exception):
    """This run's minutes are over; its checkpoint is written."""


class Phase:
    """One phase of one run, with its checkpoint.

    Parameters
    ----------
    args
        Of the command.
    run, name
        As in `PHASES`.
    rows
        Makes the batches.
    until
        When to stop, by `time.monotonic`.
    """

    def __init__(
        self, args: argparse.Namespace, run: str, name: str, rows: Rows, until: float
    ) -> None:
        self.args, self.run_name, self.name, self.until = args, run, name, until
        self.device = torch.device(args.device)
        self.path = args.workdir / f"{run}-{name}.pt"
        self.part = args.workdir / f"{run}-{name}.part.pt"
        tokens = {"dense": args.dense_tokens, "index": args.index_tokens}
        self.steps = max(1, round(tokens.get(name, args.long_tokens) / args.batch_tokens))
        self.length = args.dense_length if name == "dense" else args.length
        torch.manual_seed(args.seed)
        self.model = ClsaForCausalLM(make_config(args, run))
        before = {"long": f"{run}-dense", "index": "yoco-dense", "joint": f"{run}-index"}.get(name)
        if before is not None:
            weights = torch.load(args.workdir / f"{before}.pt", map_location="cpu")["model"]
            # YOCO's weights have no indexer; it starts at random.
            wrong = self.model.load_state_dict(weights, strict=False)
            assert not wrong.unexpected_keys
            assert name == "index" or not wrong.missing_keys
        self.model.to(self.device).train()
        self.unproven = args.compile  # until a step of the compiled layers has run
        if args.compile:
            compile_layers(self.model)
        if name == "index":
            indexer = self.model.model.indexer
            self.model.requires_grad_(False)
            indexer.requires_grad_(True)
            # Dense attention is the target, and dense is what frozen layers attend with.
            self.model.config.index_topk = self.length
            self.optimizers = [torch.optim.Adam(indexer.parameters(), args.index_lr, (0.9, 0.95))]
        else:
            self.optimizers = build_optimizers(self.model, args.muon_lr, args.adam_lr)
        self.step, self.seconds = 0, 0.0
        if self.part.exists():
            saved = torch.load(self.part, map_location="cpu")
            self.model.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.step, self.seconds = saved["step"], saved["seconds"]
        self.base = [args.index_lr] if name == "index" else [args.muon_lr, args.adam_lr]
        count = max(1, args.batch_tokens // self.length)
        first = 10**6 * (name != "dense")  # the long and joint phases see the same tokens
        batches = Batches(
            rows, args.seed, count, self.length, first + self.step, first + self.steps
        )
        self.batches = loader(batches, args.workers)

    def rate(self) -> float:
        """Learning-rate factor: warm-up, and a fall to zero at the end of all but `dense`."""
        left = 1.0 if self.name == "dense" else (1 - self.step / self.steps) / DECAY
        return min(1.0, (self.step + 1) / WARMUP_STEPS, left)

    def losses(
        self, ids: Tensor, targets: Tensor, answers: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Sums over counted tokens, and the index's loss.

        The sums [3] are the losses of text and of answers, in nats, and the answers' right tokens.
        """
        indexed = self.name in ("index", "joint")
        targets, answers = targets.flatten(), answers.flatten()
        counted = (targets >= 0).nonzero()[:, 0]  # on the CPU, so that the device does not wait
        ids, counted, targets, answers = (
            x.to(self.device, non_blocking=True)
            for x in (ids, counted, targets[counted], answers[counted])
        )
        on_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu):
            out = self.model.model(ids, use_cache=False, index_loss=indexed)
            if self.name == "index":
                return None, out.index_loss
            # Half of all tokens are of prompts, and no logits of theirs are needed.
            states = out.last_hidden_state.flatten(0, 1).index_select(0, counted)
            logits = self.model.lm_head(states).float()
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        right = (logits.argmax(-1) == targets) & answers
        sums = (loss * ~answers).sum(), (loss * answers).sum(), right.float().sum()
        return torch.stack(sums), out.index_loss

    def gradients(self, batch: Row) -> dict[str, Any]:
        """Gradients of a batch, found in pieces of a few rows; returns what the log shows."""
        size = max(1, self.args.rows_at_once * self.args.length // self.length)
        pieces = list(zip(*(x.split(size) for x in batch), strict=True))
        answers = int(batch[2].sum())
        texts = int((batch[1] >= 0).sum()) - answers
        weight = self.args.answer_weight
        sums, found = torch.zeros(3, device=self.device), {}
        for piece in pieces:
            lm, index = self.losses(*piece)
            total = torch.zeros((), device=self.device)
            if lm is not None:
                total = total + (lm[0] + weight * lm[1]) / max(1.0, texts + weight * answers)
                sums += lm.detach()
            if index is not None:
                total = total + index * (1.0 if self.name == "index" else KD) / len(pieces)
                found["index"] = index.detach()
            total.backward()
        if self.name != "index":
            if texts:
                found["text"] = sums[0] / texts
            if answers:
                found |= {"answers": sums[1] / answers, "answer_accuracy": sums[2] / answers}
        return found

    def compiled_gradients(self, batch: Row) -> dict[str, Any]:
        """Gradients of a phase's first batch; where compiling fails, the phase goes on without."""
        self.unproven = False
        try:
            found = self.gradients(batch)
            # Changes nothing, but waits for the device and refuses what is not finite.
            torch.nn.utils.clip_grad_norm_(self.trained(), math.inf, error_if_nonfinite=True)
            return found
        except Exception as error:  # a compiler's errors are of any kind
            reason = " ".join(f"{type(error).__name__}: {error}".split())
        say(self.args, run=self.run_name, phase=self.name, compiled=False, reason=reason[:300])
        for layer in self.model.model.layers:
            layer._compiled_call_impl = None
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return self.gradients(batch)

    def trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def train_step(self) -> dict[str, Any]:
        batch = next(self.batches)
        found = self.compiled_gradients(batch) if self.unproven else self.gradients(batch)
        for optimizer, base in zip(self.optimizers, self.base, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * self.rate()
        torch.nn.utils.clip_grad_norm_(self.trained(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return found

    def save(self, path: Path) -> None:
        """Write a checkpoint in one piece; the last one of a phase has no optimizers."""
        state = {"model": self.model.state_dict(), "step": self.step, "seconds": self.seconds}
        if path == self.part:
            state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def train(self) -> None:
        """Train to the end of the phase, or of this run's time."""
        start, before = time.monotonic(), self.seconds
        logged, kept, at = start, start, self.step
        while self.step < self.steps:
            found = self.train_step()
            now = time.monotonic()
            if now - logged > 10 or self.step in (1, self.steps) or now > self.until:
                line = {name: round(x.item(), 4) for name, x in found.items()}
                now = time.monotonic()
                self.seconds = before + now - start
                rate = (self.step - at) * self.args.batch_tokens / max(now - logged, 1e-6)
                say(
                    self.args, run=self.run_name, phase=self.name, step=self.step, of=self.steps,
                    seconds=round(self.seconds, 1), tokens_per_second=round(rate), **line,
                )  # fmt: skip
                logged, at = now, self.step
            if now - kept > KEEP_SECONDS:
                self.save(self.part)
                kept = now
            if now > self.until and self.step < self.steps:
                self.save(self.part)
                raise OutOfTime
        self.save(self.path)
        self.part.unlink(missing_ok=True)


def say(args: argparse.Namespace, **line: object) -> None:
    """Print a line, and keep it in the log."""
    print(json.dumps(line), flush=True)
    with (args.workdir / "log.jsonl").open("a") as log:
        print(json.dumps(line), file=log)


def main() -> None:
    args = parse()
    until = time.monotonic() + 60 * (args.stop_after or 1e9)
    args.workdir.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    if not (args.workdir / "model" / "tokenizer.json").exists():
        build_tokenizer(2 * args.length, args.packages).save_pretrained(args.workdir / "model")
    tokenizer = Tokenizer.from_file(str(args.workdir / "model" / "tokenizer.json"))
    rows = None
    try:
        for run, name in PHASES:
            if not (args.workdir / f"{run}-{name}.pt").exists():
                rows = rows or Rows(tokenizer, packages=args.packages)
                Phase(args, run, name, rows, until).train()
    except OutOfTime:
        sys.exit("out of time; the same command goes on from here")
    measure(args, {mode: make_config(args, mode) for mode in MODES})


if __name__ == "__main__":
    main()
