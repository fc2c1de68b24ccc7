"""Count right answers of the embedded model through `model.generate`: stock attention and DELTA.

    python training/evaluate.py --problems 200 --batch 200 --device cuda --out benchmarks/results

Problems are fresh: their seeds are above the ones that chose the plan, and training drew its own
from 62 bits. Every problem is generated to its end; nothing is teacher-forced.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import deltadecode as dd
from deltadecode.lab.results import result, row, write_result
from deltadecode.lab.tasks import Problem, extract_answer, is_correct, make_problem, model_path

FIRST_SEED = 2_000_000_000
SIDES = ("full", "delta")


def generate(model, tokenizer, problems: list[Problem], batch: int) -> tuple[list[str], list[int]]:
    """Greedy solutions of the problems, and the number of tokens of each."""
    texts, lengths = [], []
    for start in range(0, len(problems), batch):
        part = problems[start : start + batch]
        inputs = tokenizer([p.prompt for p in part], return_tensors="pt", padding=True)
        inputs = inputs.to(model.device)
        out = model.generate(**inputs, max_new_tokens=4300, do_sample=False)
        new = out[:, inputs.input_ids.shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
        lengths += (new != tokenizer.pad_token_id).sum(1).tolist()
    return texts, lengths


def summary(problems: list[Problem], full: list[str], delta: list[str]) -> dict[str, float]:
    """Counts over the problems; agreement is about the final answer."""
    same = sum(extract_answer(a) == extract_answer(b) for a, b in zip(full, delta, strict=True))
    return {
        "problems": len(problems),
        "first_seed": FIRST_SEED,
        "right_full": sum(is_correct(p, t) for p, t in zip(problems, full, strict=True)),
        "right_delta": sum(is_correct(p, t) for p, t in zip(problems, delta, strict=True)),
        "same_answer": same,
        "whole_text_right_full": sum(
            p.solution.strip() == t.strip() for p, t in zip(problems, full, strict=True)
        ),
        "whole_text_right_delta": sum(
            p.solution.strip() == t.strip() for p, t in zip(problems, delta, strict=True)
        ),
    }


def one_side(side: str, args: argparse.Namespace) -> None:
    """Generate with stock attention or with DELTA, and keep what came out."""
    problems = make_problems(args)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    model.to(args.device)
    if side == "delta":
        dd.enable(model)
    start = time.perf_counter()
    texts, lengths = generate(model, tokenizer, problems, args.batch)
    kept = {"texts": texts, "lengths": lengths, "seconds": time.perf_counter() - start}
    made = result("eval", "", [])
    kept["made_by"] = {key: made[key] for key in ("commit", "machine", "versions")}
    if side == "delta":
        stats = dd.stats(model)
        kept |= {"attended_tokens": stats.attended_tokens, "full_tokens": stats.full_tokens}
    (args.work / f"{side}.json").write_text(json.dumps(kept))
    print(json.dumps({"side": side, "seconds": round(kept["seconds"], 1)}), flush=True)


def make_problems(args: argparse.Namespace) -> list[Problem]:
    sizes = {} if args.steps is None else {"steps": args.steps}
    return [make_problem(FIRST_SEED + i, **sizes) for i in range(args.problems)]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--problems", type=int, default=200)
    p.add_argument("--batch", type=int, default=200)
    p.add_argument("--device", default="cuda")
    p.add_argument("--steps", type=int, help="steps of a problem, the task's default otherwise")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--work", type=Path, help="where each side's texts are kept; default: --out")
    p.add_argument("--side", choices=["full", "delta"], help="only generate this side's texts")
    p.add_argument("--tag", default="embedded")
    args = p.parse_args()
    args.work = args.work or args.out
    args.work.mkdir(parents=True, exist_ok=True)
    if args.side:
        one_side(args.side, args)
        return
    # Both at once: the time of neither is a result. A killed run goes on with what it lacks.
    todo = [side for side in SIDES if not (args.work / f"{side}.json").exists()]
    running = [subprocess.Popen([sys.executable, *sys.argv, "--side", side]) for side in todo]
    if any([side.wait() for side in running]):
        sys.exit("generating failed")
    full, delta = (json.loads((args.work / f"{side}.json").read_text()) for side in SIDES)
    problems = make_problems(args)
    lengths = full["lengths"] + delta["lengths"]
    found = summary(problems, full["texts"], delta["texts"]) | {
        "attended_fraction": round(delta["attended_tokens"] / delta["full_tokens"], 5),
        "tokens_generated_least": min(lengths),
        "tokens_generated_most": max(lengths),
        "problems_below_4000_tokens_full": sum(n < 4000 for n in full["lengths"]),
        "problems_below_4000_tokens_delta": sum(n < 4000 for n in delta["lengths"]),
    }
    rows = [
        row("right answers", "full attention", "wrong or missing answers, plus one",
            1 + len(problems) - found["right_delta"], 1 + len(problems) - found["right_full"],
            **found),
        row("attended tokens", "full attention", "tokens read in all decode steps and layers",
            delta["attended_tokens"], delta["full_tokens"]),
    ]  # fmt: skip
    command = f"python training/evaluate.py --problems {args.problems} --batch {args.batch}"
    command += f" --device {args.device}"
    made = result("eval", command, rows) | delta["made_by"]
    made["commit_full_attention"] = full["made_by"]["commit"]
    path = write_result(made, args.out, args.tag)
    print(json.dumps(found, indent=1), path.name, flush=True)


if __name__ == "__main__":
    main()
