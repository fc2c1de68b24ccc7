"""``deltadecode inspect``: a report on what a model's attention does."""

from __future__ import annotations

import datetime
import importlib.util
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from deltadecode.architecture import longest_prompt, text_config
from deltadecode.cli import loading, options
from deltadecode.cli.files import write_each
from deltadecode.cli.output import (
    BadInput,
    note,
    print_json,
    progress_bar,
    progress_reporter,
    quiet_libraries,
    stderr,
    stdout,
)
from deltadecode.cli.prompts import encode, fit, read_prompt
from deltadecode.config import DeltaConfig
from deltadecode.lab.inspection.folder import (
    KIND,
    NUMBERS,
    PAGE,
    check_report_folder,
    write_report,
)

CONTEXT = 4000
_SINKS = "Attention sinks"
_WRITE = 0.4  # about the share of the work that writing is, where the model writes


def inspect(
    model: options.Model,
    prompt: options.PromptOption = None,
    prompt_file: options.PromptFile = None,
    task: Annotated[
        str | None,
        typer.Option(help="Take the text from a task of 'deltadecode eval', such as needle."),
    ] = None,
    seed: options.ProblemSeed = options.FIRST_PROBLEM,
    no_chat_template: options.NoChatTemplate = False,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Most tokens to write.")] = 512,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    epsilon: Annotated[
        float,
        typer.Option(help="Mean attention above which a token is a sink.", rich_help_panel=_SINKS),
    ] = 0.3,
    least_queries: Annotated[
        int,
        typer.Option(
            min=1, help="Queries that must see a token that counts.", rich_help_panel=_SINKS
        ),
    ] = 64,
    loss_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="Decode steps for the losses with the sinks treated; 0: leave them out.",
            rich_help_panel=_SINKS,
        ),
    ] = 256,
    plan: options.PlanFile = None,
    page_size: options.PageSize = None,
    budget_pages: options.BudgetPages = None,
    budget_share: options.BudgetShare = None,
    recent_pages: options.RecentPages = None,
    sink_pages: options.SinkPages = None,
    dense_layers: options.DenseLayers = None,
    delta_layers: options.DeltaLayers = None,
    out: options.ReportFolder = Path("report"),
    results: options.Results = None,
    tag: options.Tag = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what a model's attention does: layers, pages, heads, attention sinks.

    Looks at the decode steps of one text under full attention, and writes a self-contained page
    (index.html), figures (PNG) and all numbers (report.json). The text is a prompt and what the
    model writes behind it, or a real one (--task text:...), by default of Python's documentation.
    """
    fields = options.plan_fields(
        page_size, budget_pages, recent_pages, sink_pages, dense_layers, delta_layers, budget_share
    )
    if not 0.0 < epsilon < 1.0:
        raise BadInput(f"--epsilon must be between 0 and 1, got {epsilon}")
    check_installed()
    check_report_folder(out)
    source = _source(model, prompt, prompt_file, task)
    folder = loading.resolve_model(model)
    quiet_libraries()
    from deltadecode.lab.inspection.report import make_report, summary_lines
    from deltadecode.lab.inspection.run import continue_prompt, inspect_text

    place = loading.find_device(device)
    config = loading.load_config(folder)
    cfg = loading.make_plan(config, plan, fields)
    tokenizer = loading.load_tokenizer(folder)
    if source == ("task", ""):
        source = "task", _documentation(config, max_new_tokens)
    ids, count, text_name = _text(tokenizer, source, seed, use_template=not no_chat_template)
    real = len(ids) > count
    steps = _steps(config, count, len(ids) - count if real else max_new_tokens)
    cfg = _budget(cfg, count, steps, free=plan is None and budget_pages is None)
    loaded = loading.load_model(folder, dtype, place)
    with progress_bar("inspection", 1.0) as (bar, bar_task):
        show = progress_reporter(bar, bar_task)
        if real:
            written, ids = 0.0, ids[: count + steps]
        else:
            written = _WRITE
            ids = continue_prompt(
                loaded,
                tokenizer,
                ids,
                steps,
                lambda step: show("full attention writes", written * step / steps, None),
            )
        inspection = inspect_text(
            loaded, ids, count, cfg, loss_steps=loss_tokens, epsilon=epsilon,
            progress=lambda part, done: show(part, written + (1 - written) * done, None),
        )  # fmt: skip
    made_by = _made_by(model, loaded, text_name)
    report = make_report(
        inspection, lambda token: str(tokenizer.decode([token])), made_by, epsilon, least_queries
    )
    if as_json:
        print_json(report)
    else:
        for line in summary_lines(report):
            stdout().print(line, markup=False, soft_wrap=True)
    outputs = [(out, lambda: _write(report, inspection.pages, out))]
    if results is not None:
        outputs.append((results, lambda: _write_result(report, results, tag)))
    write_each(*outputs)


def check_installed() -> None:
    """Refuse to start what could not be drawn."""
    for name in ("plotly", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise BadInput(f"inspect needs {name}; pip install 'deltadecode[lab]' brings it")


def _source(
    model: str, prompt: str | None, prompt_file: Path | None, task: str | None
) -> tuple[str, str]:
    """What the text is taken from: ``task`` or ``prompt``, and its text; an empty task: any."""
    sources = {"--prompt": prompt, "--prompt-file": prompt_file, "--task": task}
    names = [name for name, value in sources.items() if value is not None]
    if len(names) > 1:
        raise BadInput(f"give one of --prompt, --prompt-file and --task, got {' and '.join(names)}")
    if prompt is not None or prompt_file is not None:
        return "prompt", read_prompt(prompt, prompt_file)
    return "task", task or ("chain" if model == options.EMBEDDED else "")


def _documentation(config: Any, steps: int) -> str:
    """The task of a model without one of its own: a real text, as long as its positions allow."""
    positions = longest_prompt(text_config(config)) or CONTEXT + steps
    context = min(CONTEXT, max(positions - steps, 1))
    return f"text:stdlib-docs:context={context}:tokens={steps}"


def _text(
    tokenizer: Any, source: tuple[str, str], seed: int, *, use_template: bool
) -> tuple[list[int], int, str]:
    """Token ids of the text, how many of them are the prompt, and its name in the report."""
    kind, text = source
    name = "a prompt of its user's"
    if kind == "task":
        from deltadecode.lab.tasks.registry import make_task
        from deltadecode.lab.tasks.text import Text

        name = f"task {text}, seed {seed}"
        task = make_task(text)
        if isinstance(task, Text):
            return task.pieces(tokenizer, [seed])[0], task.context, name
        text = task.sample(
            seed, lambda words: len(tokenizer(words, add_special_tokens=False).input_ids)
        ).prompt
    ids = encode(tokenizer, text, None, use_template=use_template)[0].tolist()
    return ids, len(ids), name


def _steps(config: Any, count: int, max_new_tokens: int) -> int:
    """Tokens to write after a prompt of ``count`` tokens."""
    steps = fit(config, count, max_new_tokens)
    if steps < 2:
        raise BadInput(f"the prompt's {count} tokens leave the model no positions to write in")
    if steps < max_new_tokens:
        note(f"writing at most {steps} tokens: the model has no more positions")
    return steps


def _budget(cfg: DeltaConfig, count: int, steps: int, *, free: bool) -> DeltaConfig:
    """A budget with something to select; only one that nobody has asked for may be changed.

    A share becomes the pages that it gives when half of the new tokens are written.
    """
    from deltadecode.lab.inspection.run import fit_config

    half = -(-(count + steps // 2) // cfg.page_size)
    cfg = replace(cfg, budget_pages=cfg.pages_for(half), budget_share=0.0)
    if free:
        fitted = fit_config(cfg, count, steps)
        if fitted != cfg:
            note(
                f"the text is short for the plan's budget of {cfg.budget_pages} pages; pages are "
                f"selected with a budget of {fitted.budget_pages}"
            )
        return fitted
    # The last token written is never in the cache.
    pages = -(-(count + steps - 1) // cfg.page_size)
    if pages <= cfg.budget_pages:
        raise BadInput(
            f"the budget must be less than the {pages} pages of the text, got {cfg.budget_pages}"
        )
    return cfg


def _made_by(model: str, loaded: Any, text_name: str) -> dict[str, Any]:
    from deltadecode.lab.evaluation.runner import fingerprint
    from deltadecode.lab.results import result

    made = result("inspection", shlex.join(["deltadecode", *sys.argv[1:]]), [])
    return {
        "kind": KIND,
        **{key: made[key] for key in ("command", "commit", "machine", "versions")},
        "date": datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y-%m-%d"),
        "model": {
            # The last part: a path says where it lies on this machine.
            "name": Path(model).name,
            "class": type(loaded).__name__,
            "fingerprint": fingerprint(loaded),
            "dtype": str(loaded.dtype).removeprefix("torch."),
        },
        "text": text_name,
    }


def _write(report: dict[str, Any], pages: Any, folder: Path) -> str:
    with stderr().status("drawing"):
        write_report(report, pages, folder)
    return f"wrote {folder / PAGE}, {NUMBERS} and figures"


def _write_result(report: dict[str, Any], folder: Path, tag: str | None) -> str:
    from deltadecode.lab.inspection.report import result_rows
    from deltadecode.lab.results import write_result

    head = {key: report[key] for key in ("command", "commit", "machine", "versions")}
    rest = {key: value for key, value in report.items() if key not in head}
    result = {"benchmark": "inspection", **head, "rows": result_rows(report), "report": rest}
    return f"wrote {write_result(result, folder, tag)}"
