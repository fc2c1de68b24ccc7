"""Loss and right answers of the trained models on fresh problems and on texts held out.

Answers are teacher-forced: one is right when every token of it is the model's first choice. Also
the share of dense attention that the index covers. The CLSA model is exported in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from deltadecode.lab.results import result, row, write_result
from deltadecode.models.clsa import ClsaConfig, ClsaForCausalLM

from .data import KINDS, Rows

MIXED = "mixed"  # rows as in training: documents of all kinds
MEASURED = (*KINDS, MIXED)
LAST = {"clsa": "joint", "yoco": "long", "transformer": "long"}


def load(workdir: Path, config: ClsaConfig, device: str) -> ClsaForCausalLM:
    """A trained model, in the dtype that it was trained in."""
    model = ClsaForCausalLM(config)
    path = workdir / f"{config.mode}-{LAST[config.mode]}.pt"
    model.load_state_dict(torch.load(path, map_location="cpu")["model"])
    return model.to(device).eval()


@torch.no_grad()
def score(model: ClsaForCausalLM, rows: Rows, kind: str, args: argparse.Namespace) -> dict:
    """Loss in nats, right tokens and right answers on rows of one kind, and coverage.

    `mixed` has the mean loss of all counted tokens, each alike.
    """
    rng = random.Random(f"measure/{kind}")
    device, indexed = args.device, model.config.mode == "clsa"
    sums = dict.fromkeys(("loss", "tokens", "right", "answers", "whole"), 0.0)
    coverage = []
    documents = None if kind == MIXED else kind
    for _ in range(args.samples):
        ids, targets, _ = (x.to(device) for x in rows.row(rng, args.length, documents))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled="cuda" in device):
            out = model(ids[None], use_cache=False, index_loss=indexed)
        logits, counted = out.logits[0].float(), targets >= 0
        sums["loss"] += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        sums["tokens"] += counted.sum().item()
        right = logits.argmax(-1) == targets
        sums["right"] += (right & counted).sum().item()
        # An answer is a run of counted tokens.
        begins = counted & ~torch.nn.functional.pad(counted[:-1], (1, 0))
        answer = begins.cumsum(0)[counted]
        wrong = torch.zeros(int(begins.sum()) + 1, device=device)
        wrong.index_add_(0, answer, (~right[counted]).float())
        sums["answers"] += len(wrong) - 1
        sums["whole"] += (wrong[1:] == 0).sum().item()
        if indexed:
            coverage.append(out.index_coverage.item())
    found = {
        "loss": sums["loss"] / sums["tokens"],
        "token_accuracy": sums["right"] / sums["tokens"],
    }
    if kind not in ("text", MIXED):
        found["answers_right"] = sums["whole"] / sums["answers"]
        found["answers"] = int(sums["answers"])
    if coverage:
        found["coverage"] = sum(coverage) / len(coverage)
    return found


def measure(args: argparse.Namespace, configs: dict[str, ClsaConfig]) -> None:
    """Measure all modes on the same rows, print it, write a result file and export CLSA."""
    tokenizer = Tokenizer.from_file(str(args.workdir / "model" / "tokenizer.json"))
    rows, found = Rows(tokenizer, validation=True, packages=args.packages), {}
    for mode, config in configs.items():
        model = load(args.workdir, config, args.device)
        found[mode] = {kind: score(model, rows, kind, args) for kind in MEASURED}
        found[mode]["parameters"] = model.num_parameters()
        print(json.dumps({"mode": mode, **found[mode]}), flush=True)
        if mode == "clsa":
            model.generation_config.do_sample = False
            model.to(torch.bfloat16).save_pretrained(args.workdir / "model")
    if args.out:
        command = "python " + " ".join(sys.argv)
        print(write_result(result("clsa-training", command, table(found, args)), args.out))


def table(found: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the result file: CLSA's loss beside that of each other mode."""
    made = []
    for peer in ("yoco", "transformer"):
        for kind in MEASURED:
            ours, theirs = found["clsa"][kind], found[peer][kind]
            made.append(
                row(
                    f"{kind}, {args.length} tokens", peer, "nats a token", ours["loss"],
                    theirs["loss"], clsa=ours, other=theirs, topk=args.topk,
                    parameters=[found["clsa"]["parameters"], found[peer]["parameters"]],
                )
            )  # fmt: skip
    return made
