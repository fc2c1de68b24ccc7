"""``deltadecode eval``: accuracy of DELTA and its peers on a task, at chosen budgets."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from deltadecode.architecture import attention_layers, signature
from deltadecode.cli import loading, options
from deltadecode.cli.files import OutputError, attempt, check_file, check_folder, write_each
from deltadecode.cli.output import (
    BadInput,
    note,
    print_json,
    progress_bar,
    progress_reporter,
    quiet_libraries,
    stdout,
)

_POLICIES = "full,delta,quest,quest-kv,tidal,tidal-kv,streaming,h2o,oracle,random"


@dataclass(frozen=True)
class _Request:
    """The cells that were asked for, in numbers and names."""

    policies: list[str]
    budgets: list[int]
    fractions: list[float]
    ablation: list[str]
    plan: Path | None
    overhead: bool


@dataclass(frozen=True)
class _Destination:
    """Where a report goes beside stdout."""

    results: Path | None
    tag: str
    docs: Path | None
    as_json: bool

    def check(self) -> None:
        """Refuse what could not be written, before anything runs."""
        if self.docs is None and self.results is None:
            return
        from deltadecode.lab.evaluation.statistics import check_installed

        check_installed()
        if self.docs is not None:
            from deltadecode.lab.evaluation.report import document_parts

            if self.results is None:
                raise BadInput("--docs needs --results, the folder of the files that it links to")
            document_parts(self.docs, self.tag)
            check_file("--docs", self.docs)


def eval_command(
    model: options.OptionalModel = None,
    task: Annotated[
        str,
        typer.Option(
            help="chain, needle, tracking, text or perplexity, with options: chain:steps=96."
        ),
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
            help="layers, recent, page-size, heads, accumulate, reuse, sinks, refresh or plans; "
            "repeatable."
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="For --ablation plans: file of deltadecode calibrate.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Problems.")] = 50,
    seed: options.ProblemSeed = options.FIRST_PROBLEM,
    batch: options.Batch = 16,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    out: options.SamplesFolder = Path("eval"),
    chat: options.Chat = False,
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
    results: options.Results = None,
    tag: options.Tag = "samples",
    docs: Annotated[
        Path | None, typer.Option(help="Markdown file whose eval:TAG part gets the tables.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure accuracy, tokens read and tokens kept of DELTA and its peers on one task.

    Every sample is a line of a file in --out; a run that was stopped goes on from there. At its
    end, or with --report, a table compares every policy with full attention, sample by sample.
    """
    destination = _Destination(results, tag or "samples", docs, as_json)
    if report:
        quiet_libraries()
        destination.check()
        _report(report, destination)
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
    if lm_eval is not None and (request.fractions or ablation or results or docs):
        raise BadInput("--lm-eval goes with --policies and --budgets only")
    check_folder("--out", out)
    folder = loading.resolve_model(model)
    quiet_libraries()
    destination.check()
    from deltadecode.lab.evaluation.cells import check_policies
    from deltadecode.lab.evaluation.runner import Evaluation
    from deltadecode.lab.evaluation.statistics import can_report
    from deltadecode.lab.tasks.registry import make_task

    problems = make_task(task)
    config, place = loading.load_config(folder), loading.find_device(device)
    attention_layers(config)  # says why where there are none
    if not ablation:
        check_policies(request.policies, request.budgets, request.fractions, config)
    tokenizer = loading.load_tokenizer(folder)
    if lm_eval is not None:
        loaded = loading.load_model(folder, dtype, place)
        _harness(loaded, tokenizer, request, _names(lm_eval), lm_eval_include, samples, batch, seed,
                 out, as_json)  # fmt: skip
        return
    # Of the configuration: whatever is refused is refused before the weights are loaded.
    evaluation = Evaluation(
        config, tokenizer, problems, samples, seed, batch, chat, keep_outputs, _made_by()
    )
    cells = _cells(evaluation.trace(), config, request)
    evaluation.model = loading.load_model(folder, dtype, place)
    with progress_bar("evaluation", 1.0) as (bar, bar_task):
        records = evaluation.run(cells, out, progress_reporter(bar, bar_task))
    if any(cell.policy == "full" for cell in cells) and can_report():
        _report([record.path for record in records], destination)
    else:
        note(f"{len(records)} files in {out} are complete; compare them with --report {out}")


def _cells(trace: Any, config: Any, request: _Request) -> list[Any]:
    from deltadecode.config import DeltaConfig
    from deltadecode.lab.evaluation.ablations import cells_of
    from deltadecode.lab.evaluation.cells import check_cells, make_cells
    from deltadecode.plan_files import load_meta
    from deltadecode.profiles import find_profile

    if request.ablation:
        plan, layers = DeltaConfig.for_model(config), attention_layers(config)
        if request.plan is not None:
            loading.make_plan(config, request.plan, {})  # says so if it is of another model
            meta = load_meta(request.plan)
        else:
            meta = (find_profile(signature(config)) or {}).get("meta", {})
        measured = meta.get("plans", {})
        cells = [
            cell for name in request.ablation for cell in cells_of(name, plan, layers, measured)
        ]
        return check_cells(cells, config, trace)
    return make_cells(
        request.policies, request.budgets, request.fractions, config, trace,
        overhead=request.overhead,
    )  # fmt: skip


def _report(paths: Sequence[Path], destination: _Destination) -> None:
    from deltadecode.lab.evaluation.statistics import check_installed

    check_installed()
    from deltadecode.lab.evaluation.report import fill_document, make_result, write
    from deltadecode.lab.evaluation.summary import load, tables

    result = make_result(load(paths), shlex.join(["deltadecode", *sys.argv[1:]]))
    if destination.as_json:
        print_json(result)
    else:
        for table in tables(result["rows"]):
            stdout().print(table)
        for line in result["verdicts"]:
            stdout().print(line, markup=False, soft_wrap=True)
    files: list[Path] = []

    def write_files() -> str:
        assert destination.results is not None
        files.extend(write(result, destination.results, destination.tag))
        return "\n".join(f"wrote {file}" for file in files)

    def fill() -> str:
        assert destination.docs is not None
        fill_document(destination.docs, destination.tag, result, files)
        return f"filled {destination.docs}"

    if destination.results is not None:
        write_each((destination.results, write_files))
    if destination.docs is not None:
        write_each((destination.docs, fill))


def _harness(
    model: Any, tokenizer: Any, request: _Request, tasks: list[str], include: Path | None,
    samples: int, batch: int, seed: int, out: Path, as_json: bool,
) -> None:  # fmt: skip
    from deltadecode.lab.evaluation.cells import Trace, make_cells, slug
    from deltadecode.lab.evaluation.lm_eval import evaluate

    cells = make_cells(request.policies, request.budgets, [], model, Trace(1, 1, 1))
    measured: list[dict[str, Any]] = []
    failures = []
    with progress_bar("lm-eval", len(cells)) as (bar, bar_task):
        for cell in cells:
            bar.update(bar_task, description=cell.label)
            values = evaluate(model, tokenizer, cell, tasks, include=include, limit=samples,
                              batch=batch, seed=seed)  # fmt: skip
            measured.append(values)
            path = out / f"lm-eval__{slug(cell.policy)}__{cell.budget}.json"
            # At once, since the next cell may be interrupted.
            failures.append(attempt(path, partial(_save, path, values)))
            bar.advance(bar_task)
    if as_json:
        print_json({"cells": measured})
    else:
        for values in measured:
            for name, metrics in values["results"].items():
                numbers = {k: v for k, v in metrics.items() if isinstance(v, float)}
                line = ", ".join(f"{key} {number:.4g}" for key, number in numbers.items())
                stdout().print(
                    f"{values['policy']} {values['budget']}: {name}: {line}", markup=False
                )
    if any(failures):
        raise OutputError("; ".join(failure for failure in failures if failure))


def _save(path: Path, values: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1, default=str) + "\n", encoding="utf-8")
    return f"wrote {path}"


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
        numbers = "whole numbers" if kind is int else "numbers"
        raise BadInput(f"{option} must be {numbers} with commas between, got {text!r}") from None
