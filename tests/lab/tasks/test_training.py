"""The training scripts: a few CPU steps, and the same mathematics as Transformers' Llama."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]


def run(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "training" / script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_few_steps_lower_the_loss_continue_and_export(tmp_path):
    small = ["--device", "cpu", "--no-compile", "--layers", 2, "--workers", 0]
    small += ["--batch-tokens", 512, "--minutes", 1000, "--workdir", tmp_path]
    first = json.loads(run("train.py", *small, "--max-steps", 2).splitlines()[-1])
    later = json.loads(run("train.py", *small, "--max-steps", 20).splitlines()[-1])
    assert later["step"] == 22
    assert later["loss"]["256"] < first["loss"]["256"] - 0.2
    run("export.py", "--workdir", tmp_path, "--out", tmp_path / "model")
    check_logits(tmp_path)


def check_logits(folder: Path) -> None:
    """Exported weights in LlamaForCausalLM give the training model's logits."""
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str(ROOT / "training"))
    try:
        from model import Llama, Shape
    finally:
        sys.path.pop(0)
    saved = torch.load(folder / "checkpoint.pt")
    ours = Llama(Shape(**saved["shape"]))
    ours.load_state_dict({k: v.bfloat16().float() for k, v in saved["model"].items()})
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    ids = torch.randint(3, 500, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_plan_search_masks_agree_with_the_integration(tmp_path):
    """A masked pass of plan_search.py predicts what generating under the same plan gives."""
    script = tmp_path / "compare.py"
    script.write_text(COMPARISON)
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'training'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


COMPARISON = """
import torch
from plan_search import Case, Plan, attended_fraction, solution_loss
from model import Llama, Shape
from transformers import AutoModelForCausalLM
import deltadecode as dd
from deltadecode.lab.tasks import make_problem, model_path
from deltadecode.lab.tasks.vocabulary import EOS_ID, encode

model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
config = model.config
shape = Shape(vocab_size=config.vocab_size)
ours = Llama(shape)
ours.load_state_dict(model.state_dict())
problem = make_problem(3, steps=12, distractors=15)
prompt, solution = encode(problem.prompt), [*encode(problem.solution), EOS_ID]
case = Case(torch.tensor(prompt + solution), len(prompt))
plan = Plan((), (0, 5, 7, 16), 12, 4, 8)
_, predicted = solution_loss(ours, case, plan)

dd.enable(model, dd.DeltaConfig(page_size=8, budget_pages=12, recent_pages=4, dense_layers=(),
                                delta_layers=(0, 5, 7, 16)))
with torch.no_grad():
    out = model(case.ids[None, : case.prompt])
    logits, cache = [out.logits[0, -1]], out.past_key_values
    for token in case.ids[case.prompt : -1]:
        logits.append(model(token[None, None], past_key_values=cache).logits[0, -1])
measured = torch.nn.functional.cross_entropy(torch.stack(logits), case.ids[case.prompt :])
assert abs(measured.item() - predicted) <= 1e-3 * max(1.0, predicted), (measured, predicted)
stats = dd.stats(model)
expected = attended_fraction(case, plan, 24)
assert abs(stats.attended_fraction - expected) < 1e-9, (stats.attended_fraction, expected)
"""
