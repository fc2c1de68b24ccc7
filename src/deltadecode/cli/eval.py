"""``deltadecode eval``: accuracy of DELTA and its peers on a task, at chosen budgets."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from deltadecode.cli.loading import (
    EMBEDDED,
    check_model_path,
    checked_dtype,
    find_device,
    load_model,
    load_tokenizer,
    make_plan,
    model_folder,
)
from deltadecode.cli.output import (
    BadInput,
    check_tag,
    note,
    print_json,
    progress_bar,
    quiet_libraries,
    stdout,
    teller,
)

_POLICIES = "full,delta,quest,quest-kv,tidal,tidal-kv,streaming,h2o,oracle,random"


@dataclass(frozen=True)
class _Request:
    """What was asked for, in numbers and names."""

    policies: list[str]
    budgets: list[int]
    fractions: list[float]
    ablation: list[str]
    plan: Path | None
    overhead: bool


def eval_command(
    model: Annotated[
        str | None,
        typer.Argument(
            help=f"Folder or hub name of a model, or '{EMBEDDED}' for the package's own."
        ),
    ] = None,
    task: Annotated[
        str,
        typer.Option(help="chain, needle, tracking or perplexity, with options: chain:steps=96."),
    ] = "chain",
    policies: Annotated[
        str, typer.Option(help="Names with commas between, with options: delta:recent_pages=4.")
    ] = _POLICIES,
    budgets: Annotated[
        str | None, typer.Option(help="Tokens a sparse layer may read, with commas between.")
    ] = None,
    attended_fraction: Annotated[
        str | None,
        typer.Option(help="Solve each policy's budget for this share of full attention's reads."),
    ] = None,
    count_overhead: Annotated[
        bool,
        typer.Option(help="Let that share cover other reads too, such as Quest's page bounds."),
    ] = False,
    ablation: Annotated[
        list[str] | None,
        typer.Option(
            help="layers, recent, page-size, heads, reuse, sinks, refresh or plans; repeatable."
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="For --ablation plans: file of deltadecode calibrate.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Problems.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the first problem.")] = 3_000_000_000,
    batch: Annotated[int, typer.Option(min=1, help="Problems that are decoded together.")] = 16,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="As PyTorch names it, or auto.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder of the samples' files.")] = Path("eval"),
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template.")] = False,
    keep_outputs: Annotated[
        bool, typer.Option("--keep-outputs", help="Store whole texts.")
    ] = False,
    lm_eval: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness instead of --task.")
    ] = None,
    lm_eval_include: Annotated[
        Path | None, typer.Option(help="Folder with further task files of the harness.")
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(help="Only report on files or folders of samples; repeatable."),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder for eval-<date>-<tag>.json and its figures.")
    ] = None,
    tag: Annotated[str, typer.Option(help="Last part of the result's name.")] = "samples",
    docs: Annotated[
        Path | None, typer.Option(help="Markdown file whose eval:TAG part gets the tables.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure accuracy, tokens read and tokens kept of DELTA and its peers on one task.

    Every sample is a line of a file in --out; a run that was stopped goes on from there. At its
    end, or with --report, a table compares every policy with full attention, sample by sample.
    """
    quiet_libraries()

    check_tag(tag)
    if report:
        _report(report, results, tag, docs, as_json)
        return
    if model is None:
        raise BadInput("Missing argument 'MODEL': a folder, a hub name, or 'embedded'")
    if plan is not None and "plans" not in (ablation or []):
        raise BadInput("--plan goes with --ablation plans only")
    request = _Request(
        _names(policies), _numbers("--budgets", budgets, int),
        _numbers("--attended-fraction", attended_fraction, float), ablation or [], plan,
        count_overhead,
    )  # fmt: skip
    loaded, tokenizer = _load(model, dtype, device)
    if lm_eval is not None:
        _harness(loaded, tokenizer, request, _names(lm_eval), lm_eval_include, samples, batch, seed,
                 out, as_json)  # fmt: skip
        return
    from deltadecode.lab.evaluation.runner import Evaluation
    from deltadecode.lab.evaluation.statistics import can_report
    from deltadecode.lab.tasks.registry import make_task

    evaluation = Evaluation(
        loaded, tokenizer, make_task(task), samples, seed, batch, chat, keep_outputs, _made_by()
    )
    cells = _cells(evaluation, request)
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out must be a folder, got {str(out)!r}")
    with progress_bar("evaluation", 1.0) as (bar, shown):
        found = evaluation.run(cells, out, teller(bar, shown))
    if any(cell.policy == "full" for cell in cells) and can_report():
        _report([each.path for each in found], results, tag, docs, as_json)
    else:
        note(f"{len(found)} files in {out} are complete; compare them with --report {out}")


def _load(model: str, dtype: str, device: str) -> tuple[Any, Any]:
    model = model_folder(model)
    dtype = checked_dtype(dtype)
    check_model_path(model)
    tokenizer = load_tokenizer(model)
    return load_model(model, dtype, find_device(device)), tokenizer


def _cells(evaluation: Any, request: _Request) -> list[Any]:
    from deltadecode.architecture import attention_layers, signature
    from deltadecode.config import DeltaConfig, load_meta
    from deltadecode.lab.evaluation.ablations import cells_of
    from deltadecode.lab.evaluation.cells import check_cells, make_cells
    from deltadecode.profiles import find_profile

    trace = evaluation.trace()
    if request.ablation:
        config = evaluation.model.config
        plan, layers = DeltaConfig.for_model(config), attention_layers(config)
        if request.plan is not None:
            make_plan(config, request.plan, {})  # says so if it is of another model
            meta = load_meta(request.plan)
        else:
            meta = (find_profile(signature(config)) or {}).get("meta", {})
        measured = meta.get("plans", {})
        cells = [
            cell for name in request.ablation for cell in cells_of(name, plan, layers, measured)
        ]
        return check_cells(cells, evaluation.model, trace)
    return make_cells(
        request.policies, request.budgets, request.fractions, evaluation.model, trace,
        overhead=request.overhead,
    )  # fmt: skip


def _report(
    paths: Sequence[Path], results: Path | None, tag: str, docs: Path | None, as_json: bool
) -> None:
    from deltadecode.lab.evaluation.statistics import check_installed

    check_installed()
    from deltadecode.lab.evaluation.report import fill_document, make_result, write
    from deltadecode.lab.evaluation.summary import load, tables

    found = make_result(load(paths), shlex.join(["deltadecode", *sys.argv[1:]]))
    files: list[Path] = []
    if results is not None:
        files = write(found, results, tag)
        for file in files:
            note(f"wrote {file}")
    if docs is not None:
        if not files:
            raise BadInput("--docs needs --results, the folder of the files that it links to")
        fill_document(docs, tag, found, files)
        note(f"filled {docs}")
    if as_json:
        print_json(found)
        return
    for table in tables(found["rows"]):
        stdout().print(table)
    for line in found["verdicts"]:
        stdout().print(line, markup=False, soft_wrap=True)


def _harness(
    model: Any, tokenizer: Any, request: _Request, tasks: list[str], include: Path | None,
    samples: int, batch: int, seed: int, out: Path, as_json: bool,
) -> None:  # fmt: skip
    from deltadecode.lab.evaluation.cells import Trace, make_cells, slug
    from deltadecode.lab.evaluation.lm_eval import evaluate

    if request.fractions or request.ablation:
        raise BadInput("--lm-eval goes with --policies and --budgets only")
    cells = make_cells(request.policies, request.budgets, [], model, Trace(1, 1, 1))
    found = []
    with progress_bar("lm-eval", len(cells)) as (bar, shown):
        for cell in cells:
            bar.update(shown, description=cell.label)
            each = evaluate(
                model,
                tokenizer,
                cell,
                tasks,
                include=include,
                limit=samples,
                batch=batch,
                seed=seed,
            )
            out.mkdir(parents=True, exist_ok=True)
            path = out / f"lm-eval__{slug(cell.policy)}__{cell.budget}.json"
            path.write_text(json.dumps(each, indent=1, default=str) + "\n", encoding="utf-8")
            note(f"wrote {path}")
            found.append(each)
            bar.advance(shown)
    if as_json:
        print_json({"cells": found})
        return
    for each in found:
        for name, metrics in each["results"].items():
            values = {k: v for k, v in metrics.items() if isinstance(v, float)}
            shown_values = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
            stdout().print(
                f"{each['policy']} {each['budget']}: {name}: {shown_values}", markup=False
            )


def _made_by() -> dict[str, Any]:
    from deltadecode.lab.results import result

    made = result("eval", "", [])
    return {key: made[key] for key in ("commit", "machine", "versions")}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(option: str, text: str | None, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in _names(text or "")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise BadInput(f"{option} must be {what} with commas between, got {text!r}") from None
