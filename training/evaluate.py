"""Count right answers of the embedded model through `model.generate`: stock attention and DELTA.

    python training/evaluate.py --problems 200 --batch 200 --device cuda --out benchmarks/results

Problems are fresh: their seeds are above the ones that chose the plan, and training drew its own
from 62 bits. Every problem is generated to its end; nothing is teacher-forced.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import deltadecode as dd
from deltadecode.benchmark.results import result, row, write_result
from deltadecode.tasks import Problem, extract_answer, is_correct, make_problem, model_path

FIRST_SEED = 2_000_000_000


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


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--problems", type=int, default=200)
    p.add_argument("--batch", type=int, default=200)
    p.add_argument("--device", default="cuda")
    p.add_argument("--steps", type=int, help="steps of a problem, the task's default otherwise")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--tag", default="embedded")
    args = p.parse_args()
    sizes = {} if args.steps is None else {"steps": args.steps}
    problems = [make_problem(FIRST_SEED + i, **sizes) for i in range(args.problems)]
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    model.to(args.device)

    start = time.perf_counter()
    full, full_lengths = generate(model, tokenizer, problems, args.batch)
    print(json.dumps({"full_seconds": time.perf_counter() - start}), flush=True)
    dd.enable(model)
    start = time.perf_counter()
    delta, delta_lengths = generate(model, tokenizer, problems, args.batch)
    print(json.dumps({"delta_seconds": time.perf_counter() - start}), flush=True)

    stats = dd.stats(model)
    found = summary(problems, full, delta)
    found |= {
        "attended_fraction": round(stats.attended_fraction, 5),
        "tokens_generated_least": min(min(full_lengths), min(delta_lengths)),
        "tokens_generated_most": max(max(full_lengths), max(delta_lengths)),
    }
    tokens = [layer.attended_tokens for layer in stats.per_layer]
    reference = [layer.full_tokens for layer in stats.per_layer]
    rows = [
        row("right answers", "full attention", "wrong or missing answers, plus one",
            1 + len(problems) - found["right_delta"], 1 + len(problems) - found["right_full"],
            **found),
        row("attended tokens", "full attention", "tokens read in all decode steps and layers",
            sum(tokens), sum(reference)),
    ]  # fmt: skip
    command = f"python training/evaluate.py --problems {args.problems} --batch {args.batch}"
    command += f" --device {args.device}"
    path = write_result(result("eval", command, rows), args.out, args.tag)
    print(json.dumps(found, indent=1), path.name, flush=True)


if __name__ == "__main__":
    main()
