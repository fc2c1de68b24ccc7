"""Calibration of the embedded model, measured: seconds, memory, and the plan among its peers."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.memory import high_water_mib
from deltadecode.config import DeltaConfig
from deltadecode.lab.calibration.fit import Measurement, PlanRequest
from deltadecode.lab.calibration.report import CALIBRATED, against, report
from deltadecode.lab.calibration.texts import make_prompts, task_texts
from deltadecode.lab.observe import NEW_TOKENS
from deltadecode.lab.results import result, row
from deltadecode.lab.tasks import model_path
from deltadecode.lab.tasks.registry import Chain

# The size of the plan that ships with the model, so that the two can be compared.
_FULL_LAYERS = 4
PROBLEMS = 16


def run(
    command: str,
    progress: Callable[[float, float | None], None],
    problems: int = PROBLEMS,
    new_tokens: int = NEW_TOKENS,
) -> dict[str, Any]:
    """Calibrate on chain problems, and rank the plan among all of its size.

    A row compares the share of the held-out attention that is lost, weighted by need. Besides:
    ``seconds`` from loading the model to the plan, ``peak_mib`` of the process, and what
    :func:`deltadecode.lab.calibration.report.report` and ``against`` say.
    """
    start = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    request = PlanRequest(DeltaConfig.for_model(model), dense=0, deltas=_FULL_LAYERS)
    texts = task_texts(Chain(), tokenizer, problems)
    prompts = make_prompts(model, tokenizer, texts, new_tokens)
    measurement = Measurement(model, prompts, request, new_tokens)
    measurement.run(model, tokenizer, progress)
    summary = report(measurement)
    seconds = time.monotonic() - start
    others = against(measurement)
    ours = summary["plans"].pop(CALIBRATED)
    rows = [
        row(
            f"held-out attention, {measurement.request.base.budget_pages} pages", name,
            "share lost, by need", 1 - ours["kept"]["held_out"], 1 - plan["kept"]["held_out"],
            plan=plan,
        )
        for name, plan in {**summary["plans"], **others.pop("peers")}.items()
    ]  # fmt: skip
    summary["plans"][CALIBRATED] = ours
    measured = {"seconds": round(seconds, 1), "peak_mib": round(high_water_mib())}
    return {**result("calibration", command, rows), **measured, **summary, **others}
