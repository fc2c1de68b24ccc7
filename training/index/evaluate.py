"""Compare trained indexes with DELTA and its peers at equal budgets, in the lab's evaluation.

    python training/index/evaluate.py --model smollm2 --workdir RUN --out benchmarks/results

Every sample is a line in RUN/samples, and a run that was stopped goes on from there. Texts run in
float32. ``replaced`` (see train.py) reads less than DELTA at its budget, so it also comes with the
budget with which it reads as much.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deltadecode.config import DeltaConfig
from deltadecode.lab.collect_env import machine, versions
from deltadecode.lab.evaluation.cells import Cell, check_cells, expected_fraction, solve_budget
from deltadecode.lab.evaluation.records import Records
from deltadecode.lab.evaluation.runner import Evaluation
from deltadecode.lab.evaluation.summary import summarize
from deltadecode.lab.results import commit, result, write_result
from deltadecode.lab.tasks.registry import make_task
from deltadecode.lab.tasks.text import Text
from index.data import FIRST_SEED
from index.model import Index
from index.policy import known

PEERS = ("quest-kv", "streaming", "oracle")
TASKS = (
    "text:stdlib-docs:context=4000:tokens=128",
    "text:stdlib-code:context=4000:tokens=128",
    "needle:kind=single:length=4000",
    "needle:kind=multikey:length=4000",
)


class OutOfTime(Exception):
    """This run's minutes are over; its samples are written."""


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", required=True, help="folder or name of a model")
    p.add_argument("--workdir", type=Path, required=True, help="that of train.py")
    p.add_argument("--task", action="append", help="as deltadecode eval takes it")
    p.add_argument("--budget", type=int, default=512, help="tokens a sparse layer may read")
    p.add_argument("--policy", action="append", default=[], metavar="POLICY[@BUDGET]",
                   help="one more")  # fmt: skip
    p.add_argument("--pool", action="append", choices=("sum", "max"), help="of a page's tokens")
    p.add_argument("--index", action="append", help="name of a trained index; default: all")
    p.add_argument("--pieces", type=int, default=4, help="of each text")
    p.add_argument("--problems", type=int, default=100, help="of each other task")
    p.add_argument("--batch", type=int, default=50)
    p.add_argument("--stop-after", type=float, help="stop after so many minutes; run again")
    p.add_argument("--dtype", help="of problems; default: bfloat16 on a GPU, else float32")
    p.add_argument("--device", default="auto")
    p.add_argument("--out", type=Path, help="folder for a result file")
    p.add_argument("--tag")
    return p.parse_args()


def load_indexes(workdir: Path, wanted: list[str] | None) -> dict[str, Index]:
    """By name and digest, so that samples of an index that was trained again are not taken."""
    paths = sorted(path for path in workdir.glob("*.pt") if path.stem != "training")
    return {
        f"{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}": Index.load(path)
        for path in paths
        if not wanted or path.stem in wanted
    }


def make_cells(args: argparse.Namespace, model: Any, names: list[str], trace: Any) -> list[Cell]:
    """Everything that is compared, all of it checked."""
    plan, budget = DeltaConfig.for_model(model), args.budget
    delta = Cell("delta", budget)
    cells = [Cell("full", 0), delta, *(Cell(peer, budget) for peer in PEERS)]
    for text in args.policy:
        spec, _, own = text.partition("@")
        cells.append(Cell(spec, int(own or budget)))
    for pool in args.pool or ["sum"]:
        for name in names:
            spec = f"index:which={name}:recent={plan.recent_pages}:sink={plan.sink_pages}"
            spec += "" if pool == "sum" else f":pool={pool}"
            cells.append(Cell(spec, budget))
            if name.startswith("replaced"):
                fraction = expected_fraction(delta.make(model), trace)
                tokens = solve_budget(spec, model, fraction, trace, overhead=True)
                cells.append(Cell(spec, tokens // plan.page_size * plan.page_size))
    return check_cells(cells, model, trace)


def evaluate(
    args: argparse.Namespace, model: Any, tokenizer: Any, task: str, until: float
) -> list[dict[str, Any]]:
    """Rows of one task."""

    def progress(label: str, share: float, left: float | None) -> None:
        if time.monotonic() > until:
            raise OutOfTime

    made = make_task(task)
    is_text = isinstance(made, Text)
    indexes = load_indexes(args.workdir, args.index)
    evaluation = Evaluation(
        model, tokenizer, made, args.pieces if is_text else args.problems,
        seed=0 if is_text else FIRST_SEED, batch=args.batch,
        made_by={"commit": commit(), "machine": machine(), "versions": versions()},
    )  # fmt: skip
    with known(model, indexes):
        cells = make_cells(args, model, list(indexes), evaluation.trace())
        records: list[Records] = []
        # One at a time, but for texts, whose prefix is prepared once for all.
        for part in [cells] if is_text else [[cell] for cell in cells]:
            start = time.monotonic()
            records += evaluation.run(part, args.workdir / "samples", progress)
            labels = ", ".join(cell.label for cell in part)
            print(f"{time.monotonic() - start:6.1f} s  {task}: {labels}", flush=True)
    rows = summarize(records)
    for row in rows:
        which = row["policy"].partition("which=")[2].partition(":")[0]
        if which in indexes:
            row["sources"] = list(indexes[which].config.sources)
            row["width"] = indexes[which].config.width
            row["target"] = indexes[which].config.target
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        merit = f"KL {row['kl']:.4f}" if "kl" in row else f"score {row['score']:.3f}"
        reads = f"{row['attended_fraction']:.3f} + {row['metadata_fraction']:.3f}"
        print(f"{merit}  reads {reads}  {row['case']}", flush=True)


def main() -> None:
    from deltadecode.cli.loading import find_device, load_model, load_tokenizer, resolve_model

    args = parse()
    until = time.monotonic() + 60 * (args.stop_after or 1e9)
    folder, device = resolve_model(args.model), find_device(args.device)
    tokenizer, models = load_tokenizer(folder), {}
    of_problems = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    rows, done = [], True
    for task in args.task or TASKS:
        dtype = "float32" if "text" in task.partition(":")[0] else of_problems
        if dtype not in models:
            models[dtype] = load_model(folder, dtype, device)
        try:
            with torch.inference_mode():
                found = evaluate(args, models[dtype], tokenizer, task, until)
        except OutOfTime:
            done = False
            break
        show(found)
        rows += found
    if args.out and rows:
        command = "python " + " ".join(sys.argv).replace(str(args.workdir), "RUN")
        print(write_result(result("index", command, rows), args.out, args.tag))
    if not done:
        sys.exit("out of time; the same command goes on from here")


if __name__ == "__main__":
    main()
