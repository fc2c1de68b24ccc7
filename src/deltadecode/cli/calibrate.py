"""``deltadecode calibrate``: the layer plan of a model that loses least on some texts."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from deltadecode.architecture import attention_layers, longest_prompt, text_config
from deltadecode.cli import loading, options
from deltadecode.cli.files import write_each
from deltadecode.cli.output import (
    BadInput,
    print_json,
    progress_bar,
    progress_reporter,
    quiet_libraries,
    stdout,
)

_CONTEXT = 6000
_LONG_TEXTS, _SAMPLES = 6, 16
# One wrong digit in a thousand spoils a chain, so that the rare rows must be seen.
_ROWS, _OWN_ROWS = 128, 512


def calibrate(
    model: options.Model,
    data: Annotated[
        Path | None,
        typer.Option(
            help='A long text; or, as .jsonl, {"prompt": "...", "completion": "..."} a line.'
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Take samples of a task, as deltadecode eval does. Without task and data: texts "
            "and code that Python brings along; for the embedded model, task chain."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=2,
            help=f"Texts; default: all of a .jsonl file, {_SAMPLES} of a task, {_LONG_TEXTS} "
            "pieces of long texts.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens before the rows of a long text, and those that the attended fraction is "
            f"of; default: {_CONTEXT}, or what a task or .jsonl file has.",
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Decode steps that are measured in each text; default: {_ROWS}, of the embedded "
            f"model's own task {_OWN_ROWS}.",
        ),
    ] = None,
    attended_fraction: Annotated[
        float | None,
        typer.Option(
            help="Choose everything, the budget too, for this share of full attention's reads; "
            "default: that of the model's own plan."
        ),
    ] = None,
    delta_layers: Annotated[
        int | None, typer.Option(min=1, help="How many Δ-layers; K is as given.")
    ] = None,
    dense_layers: Annotated[
        int | None,
        typer.Option(min=0, help="How many dense layers before them; default: as the model's plan"),
    ] = None,
    kl: Annotated[
        float | None, typer.Option(help="The fewest reads that keep this KL, in nats a token.")
    ] = None,
    page_size: options.PageSize = None,
    budget_pages: options.BudgetPages = None,
    recent_pages: options.RecentPages = None,
    sink_pages: options.SinkPages = None,
    minutes: Annotated[
        float, typer.Option(min=0.0, help="The search ends then; the best so far is the result.")
    ] = 8.0,
    seed: options.SamplingSeed = 0,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Keep measurements in this file, and go on from it; default: PLAN.state beside "
            "--out, removed at the end.",
            metavar="FILE",
        ),
    ] = None,
    chat: options.Chat = False,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    out: options.PlanOutput = None,
    figure: options.Picture = None,
    as_json: options.AsJson = False,
) -> None:
    """Choose dense and Δ-layers, K, L and S of a model by their loss on texts.

    Every plan that is tried decodes the same tokens of some texts; its loss is the KL of full
    attention to it. Other texts judge the best ones, an even spread and the model's own plan.
    """
    if data is not None and task is not None:
        raise BadInput("give either --data FILE or --task NAME")
    _check_outputs(out, figure)
    folder = loading.resolve_model(model)
    quiet_libraries()
    config = loading.load_config(folder)
    fields = options.plan_fields(page_size, budget_pages, recent_pages, sink_pages)
    request = _request(config, fields, dense_layers, delta_layers, attended_fraction, kl)
    if data is None and task is None and model == options.EMBEDDED:
        task, rows = "chain", rows or _OWN_ROWS
    source = _source(config, data, task, samples, context, rows or _ROWS, chat)
    tokenizer = loading.load_tokenizer(folder)
    loaded = loading.load_model(folder, dtype, loading.find_device(device))

    from deltadecode.lab.calibration.report import report
    from deltadecode.lab.calibration.run import calibrate
    from deltadecode.lab.calibration.space import asked

    pieces, lengths = source(loaded, tokenizer)
    state = resume or (None if out is None else out.with_name(out.name + ".state"))
    with progress_bar("calibration", 1.0) as (bar, bar_task):
        found = calibrate(
            loaded, pieces, asked(loaded, request, lengths), lengths, minutes=minutes, seed=seed,
            state=state, progress=progress_reporter(bar, bar_task),
        )  # fmt: skip
    result = report(found)
    if as_json:
        print_json({"model": model, **result})
    else:
        stdout().print(_table(result))
    outputs: list[tuple[Path, Callable[[], str]]] = []
    if out is not None:
        name = task or ("stdlib-docs and stdlib-code" if data is None else data.name)
        outputs.append((out, lambda: _save(out, result, loaded, model, name)))
    if figure is not None:
        outputs.append((figure, lambda: _draw(figure, result)))
    write_each(*outputs)
    if state is not None and resume is None:
        state.unlink(missing_ok=True)


def _check_outputs(out: Path | None, figure: Path | None) -> None:
    if figure is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise BadInput("--figure needs matplotlib: pip install 'deltadecode[lab]'")
    if out is not None and figure.resolve() == out.resolve():
        raise BadInput(f"--out and --figure must be two files, got {str(out)!r} for both")


def _save(path: Path, result: dict[str, Any], loaded: Any, model: str, source: str) -> str:
    from deltadecode.lab.calibration.report import plan_file

    command = shlex.join(["deltadecode", *sys.argv[1:]])
    cfg, meta = plan_file(result, loaded, model, source, command)
    cfg.save(path, meta=meta)
    return f"wrote {path}; use it with --plan {path}, or DeltaConfig.load"


def _draw(path: Path, result: dict[str, Any]) -> str:
    from deltadecode.lab.calibration.figures import draw

    draw(result, path)
    return f"wrote {path}"


def _request(
    config: Any, fields: dict[str, Any], dense: int | None, deltas: int | None,
    fraction: float | None, kl: float | None,
) -> Any:  # fmt: skip
    from deltadecode.lab.calibration.space import Request

    base = loading.make_plan(config, None, fields)
    if dense is not None and deltas is None:
        raise BadInput("--dense-layers goes with --delta-layers; else their number is chosen")
    if fields["budget_pages"] is not None and (deltas is None or fraction is not None):
        raise BadInput("--budget-pages goes with --delta-layers alone; else K is chosen")
    fixed = frozenset(name for name, value in fields.items() if value is not None)
    request = Request(base, deltas, dense, fraction, kl, fixed)
    request.check(len(attention_layers(config)))
    return request


def _source(
    config: Any, data: Path | None, task: str | None, samples: int | None, context: int | None,
    rows: int, chat: bool,
) -> Callable[[Any, Any], Any]:  # fmt: skip
    """A function of model and tokenizer that gives the texts, and n for the attended fraction."""
    import numpy as np

    from deltadecode.lab.calibration import texts
    from deltadecode.lab.tasks.registry import make_task
    from deltadecode.lab.tasks.text import SOURCES, Text

    sampled = None if task is None else make_task(task)
    if isinstance(sampled, Text):
        raise BadInput("--task text is what --data FILE and no --task do; leave it out")
    if sampled is None and (data is None or data.suffix != ".jsonl"):
        tokens = _checked_context(config, context, rows)
        names = [{"source": name} for name in SOURCES] if data is None else [{"file": str(data)}]
        long = [Text(**name, context=tokens, tokens=rows) for name in names]
        return lambda model, tokenizer: (
            texts.cut(tokenizer, long, samples or _LONG_TEXTS),
            np.array([float(tokens)]),
        )
    prompts = None if data is None else texts.read_texts(data, samples)

    def short(model: Any, tokenizer: Any) -> Any:
        some = prompts
        if sampled is not None:
            some = texts.task_texts(sampled, tokenizer, samples or _SAMPLES)
        assert some is not None
        pieces = texts.make_pieces(model, tokenizer, some, rows, chat=chat)
        steps = [one.context + 1.0 + np.arange(one.rows) for one in pieces]
        return pieces, np.concatenate(steps) if context is None else np.array([float(context)])

    return short


def _checked_context(config: Any, context: int | None, rows: int) -> int:
    longest = longest_prompt(text_config(config))
    if context is None:
        return _CONTEXT if longest is None else max(min(_CONTEXT, longest - rows), 1)
    if longest is not None and context + rows > longest:
        raise BadInput(
            f"--context and --rows need {context + rows} positions, and the model has {longest}"
        )
    return context


def _table(result: dict[str, Any]) -> Table:
    texts = result["texts"]
    title = (
        f"{texts['fit']} texts to search on, {texts['held_out']} held out; "
        f"{len(result['measured'])} plans measured on all, {result['seconds']:.0f} s"
    )
    # Eight columns in 80 characters: without lines between them.
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("plan", "dense | Δ", "K L S", "reads", "KL: fit", "held out", "ppl", "top-1"):
        layers = name == "dense | Δ"
        table.add_column(
            name, justify="left" if name == "plan" or layers else "right", no_wrap=not layers,
            min_width=10 if layers else None,
        )  # fmt: skip
    for name, plan in result["plans"].items():
        low, high = plan["kl_interval"]
        fit, kinds = plan["kl"]["fit"], (plan["dense_layers"], plan["delta_layers"])
        table.add_row(
            name,
            " | ".join(" ".join(map(str, some)) or "–" for some in kinds),
            f"{plan['budget_pages']} {plan['recent_pages']} {plan['sink_pages']}",
            f"{plan['attended_fraction']:.1%}",
            "–" if fit is None else f"{fit:.3g}",
            f"{plan['kl']['held_out']:.3g} ±{(high - low) / 2:.1g}",
            f"×{plan['perplexity_ratio']:.3f}",
            f"{plan['same_top1']:.1%}",
        )
    return table
