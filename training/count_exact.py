"""Count the problems that the shipped model solves without one wrong token, full and with DELTA.

    python training/count_exact.py --problems 200 --device cuda --log exact.jsonl

Uses the masked pass of `plan_search.py` under the shipped plan; `evaluate.py` generates instead,
which takes far longer. A killed run continues: problems that the log holds are not counted again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from model import Llama, Shape
from plan_search import FIRST_SEED, Plan, attended_fraction, cases, solution_loss
from transformers import AutoModelForCausalLM

from deltadecode import DeltaConfig
from deltadecode.lab.tasks import model_path


def load_shipped(device: torch.device) -> tuple[Llama, Plan]:
    """The shipped weights in float32, and the shipped plan."""
    shipped = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    model = Llama(Shape(vocab_size=shipped.config.vocab_size))
    model.load_state_dict(shipped.state_dict())
    cfg = DeltaConfig.for_model(shipped)
    plan = Plan(
        tuple(cfg.dense_layers),
        tuple(cfg.delta_layers),
        cfg.budget_pages,
        cfg.recent_pages,
        cfg.page_size,
    )
    return model.to(device).eval(), plan


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--problems", type=int, default=200)
    p.add_argument("--skip", type=int, default=0, help="leave out the first so many problems")
    p.add_argument("--device", default="cuda")
    p.add_argument("--log", type=Path, required=True)
    p.add_argument("--delta-only", action="store_true")
    args = p.parse_args()
    device = torch.device(args.device)
    model, plan = load_shipped(device)
    start = FIRST_SEED + 1000
    lines = args.log.read_text().splitlines() if args.log.exists() else []
    done = {json.loads(line)["seed"] for line in lines}
    for seed in range(start + args.skip, start + args.problems):
        if seed in done:
            continue
        (case,) = cases(range(seed, seed + 1), device)
        found = {
            "seed": seed,
            "tokens": case.ids.shape[0] - case.prompt,
            "attended_fraction": attended_fraction(case, plan, model.shape.num_hidden_layers),
            "wrong_delta": solution_loss(model, case, plan)[0],
        }
        if not args.delta_only:
            found["wrong_full"] = solution_loss(model, case, None)[0]
        with args.log.open("a") as log:
            print(json.dumps(found), file=log, flush=True)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
