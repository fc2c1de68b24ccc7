"""``deltadecode inspect``: a report on what a model's attention does."""

from __future__ import annotations

import datetime
import importlib.util
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from deltadecode.cli.generate import Dtype, encode, fit, read_prompt
from deltadecode.cli.loading import (
    EMBEDDED,
    check_model_path,
    find_device,
    load_config,
    load_model,
    load_tokenizer,
    make_plan,
    model_folder,
    parse_layers,
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
from deltadecode.cli.plan_options import (
    BudgetPages,
    DeltaLayers,
    DenseLayers,
    PageSize,
    PlanFile,
    RecentPages,
    SinkPages,
)
from deltadecode.config import DeltaConfig

PAGE, NUMBERS = "index.html", "report.json"
KIND = "deltadecode inspection"  # what tells a report of ours from other JSON
_SINKS = "Attention sinks"


@dataclass(frozen=True)
class _Text:
    """What the model reads."""

    ids: Any
    name: str


def inspect(
    model: Annotated[str, typer.Argument(help=f"Folder or hub name of a model, or '{EMBEDDED}'.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt; '-' reads it from stdin.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Take the prompt from a task of 'deltadecode eval', such as needle."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the task's problem.")] = 3_000_000_000,
    no_chat_template: Annotated[
        bool, typer.Option("--no-chat-template", help="Give the model the bare prompt.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Most tokens to write.")] = 512,
    dtype: Annotated[Dtype, typer.Option(help="auto: that of the checkpoint.")] = Dtype.float32,
    device: Annotated[str, typer.Option(help="As PyTorch names it, or auto.")] = "auto",
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
    removal_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="Tokens for the perplexity without sinks; 0: leave it out.",
            rich_help_panel=_SINKS,
        ),
    ] = 192,
    plan: PlanFile = None,
    page_size: PageSize = None,
    budget_pages: BudgetPages = None,
    recent_pages: RecentPages = None,
    sink_pages: SinkPages = None,
    dense_layers: DenseLayers = None,
    delta_layers: DeltaLayers = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the page, the figures and the numbers.")
    ] = Path("report"),
    results: Annotated[
        Path | None, typer.Option(help="Folder for inspection-<date>-<tag>.json.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Last part of the result's name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Show what a model's attention does: layers, pages, heads, attention sinks.

    Continues one prompt with full attention, watches it, and writes a self-contained page
    (index.html), figures (PNG) and all numbers (report.json).
    """
    given = {
        "page_size": page_size,
        "budget_pages": budget_pages,
        "recent_pages": recent_pages,
        "sink_pages": sink_pages,
        "dense_layers": parse_layers("--dense-layers", dense_layers),
        "delta_layers": parse_layers("--delta-layers", delta_layers),
    }
    if not 0.0 < epsilon < 1.0:
        raise BadInput(f"--epsilon must be between 0 and 1, got {epsilon}")
    check_installed()
    check_folder(out)
    source = _source(model, prompt, prompt_file, task)
    quiet_libraries()
    from deltadecode.lab.inspection.run import inspect_text

    check_tag(tag)
    folder = model_folder(model)
    check_model_path(folder)
    place = find_device(device)
    config = load_config(folder)
    cfg = make_plan(config, plan, given)
    tokenizer = load_tokenizer(folder)
    text = _text(tokenizer, source, seed, use_template=not no_chat_template)
    count = text.ids.shape[1]
    steps = fit(config, count, max_new_tokens)
    if steps < 2:
        raise BadInput(f"the prompt's {count} tokens leave the model no positions to write in")
    if steps < max_new_tokens:
        note(f"writing at most {steps} tokens: the model has no more positions")
    cfg = _budget(cfg, count, steps, free=plan is None and budget_pages is None)
    loaded = load_model(folder, dtype.value, place)
    with progress_bar("inspection", 1.0) as (bar, shown):
        tell = teller(bar, shown)
        found = inspect_text(
            loaded, tokenizer, text.ids[0].tolist(), cfg, steps=steps, removal_steps=removal_tokens,
            progress=lambda what, done: tell(what, done, None),
        )  # fmt: skip
    made_by = _made_by(model, loaded, text)
    report = _write(found, tokenizer, made_by, epsilon, least_queries, out)
    if results is not None:
        note(f"wrote {_result(report, results, tag)}")
    if as_json:
        print_json(report)
        return
    from deltadecode.lab.inspection.report import summary_lines

    for line in summary_lines(report):
        stdout().print(line, markup=False, soft_wrap=True)


def check_installed() -> None:
    """Refuse to start what could not be drawn.

    Raises
    ------
    BadInput
        Naming what to install.
    """
    for name in ("plotly", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise BadInput(f"inspect needs {name}; pip install 'deltadecode[lab]' brings it")


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds files of these names but no report of ours.

    Parameters
    ----------
    folder : Path
        Where the report goes; need not exist. An older report in it is replaced.

    Raises
    ------
    BadInput
        Naming the file.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BadInput(f"--out must be a folder, got {str(folder)!r}")
    try:
        found = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict) and found.get("kind") == KIND:
        return
    from deltadecode.lab.inspection.names import FIGURE_FILES

    for name in (PAGE, NUMBERS, *FIGURE_FILES):
        if (folder / name).exists():
            raise BadInput(
                f"{str(folder / name)!r} is there and no report of 'deltadecode inspect' is; "
                "choose another --out"
            )


def _source(
    model: str, prompt: str | None, prompt_file: Path | None, task: str | None
) -> tuple[str, str]:
    """What the prompt is taken from: ``task`` or ``prompt``, and its text."""
    given = {"--prompt": prompt, "--prompt-file": prompt_file, "--task": task}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise BadInput(f"give one of --prompt, --prompt-file and --task, got {' and '.join(names)}")
    if prompt is not None or prompt_file is not None:
        return "prompt", read_prompt(prompt, prompt_file)
    if task is None and model != EMBEDDED:
        raise BadInput("give a text to inspect: --prompt, --prompt-file or --task; got none")
    return "task", task or "chain"


def _text(tokenizer: Any, source: tuple[str, str], seed: int, *, use_template: bool) -> _Text:
    kind, text = source
    name = "a prompt of its user's"
    if kind == "task":
        from deltadecode.lab.tasks.registry import make_task

        name = f"task {text}, seed {seed}"
        sample = make_task(text).sample(
            seed, lambda words: len(tokenizer(words, add_special_tokens=False).input_ids)
        )
        text = sample.prompt
    return _Text(encode(tokenizer, text, None, use_template=use_template), name)


def _budget(cfg: DeltaConfig, count: int, steps: int, *, free: bool) -> DeltaConfig:
    """A budget with something to select; only one that nobody has asked for may be changed."""
    from deltadecode.lab.inspection.run import fit_config

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


def _made_by(model: str, loaded: Any, text: _Text) -> dict[str, Any]:
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
        "text": text.name,
    }


def _write(
    found: Any, tokenizer: Any, made_by: dict[str, Any], epsilon: float, least: int, out: Path
) -> dict[str, Any]:
    from deltadecode.lab.inspection.figures import draw
    from deltadecode.lab.inspection.page import write_page
    from deltadecode.lab.inspection.report import make_report

    show: Callable[[int], str] = lambda token: str(tokenizer.decode([token]))  # noqa: E731
    report = make_report(found, show, made_by, epsilon, least)
    out.mkdir(parents=True, exist_ok=True)
    # First: it is what tells the folder as ours, should the rest fail.
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (out / NUMBERS).write_text(text + "\n", encoding="utf-8")
    write_page(report, found.pages, out / PAGE)
    draw(report, found.pages, out)
    note(f"wrote {out / PAGE}, {NUMBERS} and figures")
    return report


def _result(report: dict[str, Any], folder: Path, tag: str | None) -> Path:
    from deltadecode.lab.inspection.report import result_rows
    from deltadecode.lab.results import write_result

    head = {key: report[key] for key in ("command", "commit", "machine", "versions")}
    rest = {key: value for key, value in report.items() if key not in head}
    found = {"benchmark": "inspection", **head, "rows": result_rows(report), "report": rest}
    return write_result(found, folder, tag)
