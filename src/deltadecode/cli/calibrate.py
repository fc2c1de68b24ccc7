"""``deltadecode calibrate``: the layer plan of a model, from what its attention does."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from deltadecode.architecture import attention_layers
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

_SAMPLES = 16


def calibrate(
    model: options.Model,
    data: Annotated[
        Path | None,
        typer.Option(help='JSONL file: {"prompt": "...", "completion": "..."} a line.'),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Take prompts of a task instead, as deltadecode eval does.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=2, help=f"Texts; default: all of a file, {_SAMPLES} of a task."),
    ] = None,
    delta_layers: Annotated[int | None, typer.Option(min=1, help="How many Δ-layers.")] = None,
    dense_layers: Annotated[
        int | None, typer.Option(min=0, help="How many dense layers; default: as the model's plan.")
    ] = None,
    attended_fraction: Annotated[
        float | None,
        typer.Option(help="Solve the budget for this share of full attention's reads."),
    ] = None,
    recall: Annotated[
        float | None, typer.Option(help="Fewest Δ-layers that keep this share of the attention.")
    ] = None,
    page_size: options.PageSize = None,
    budget_pages: options.BudgetPages = None,
    recent_pages: options.RecentPages = None,
    sink_pages: options.SinkPages = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate for each text.")] = 192,
    stride: Annotated[int, typer.Option(min=1, help="Look at every n-th decode step.")] = 7,
    batch: options.Batch = 1,
    chat: options.Chat = False,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    out: options.PlanOutput = None,
    figure: options.Picture = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure a model's attention, and choose its dense and Δ-layers.

    The model continues each text with full attention. Two plans are fitted on half of the texts:
    the one that keeps most of the attention that layers need, and the paper's (peaks of the shift
    between layers); both are judged on the other half. With --attended-fraction alone, the numbers
    of dense and Δ-layers and of pages are chosen too.
    """
    if (data is None) == (task is None):
        raise BadInput("give either --data FILE or --task NAME")
    _check_outputs(out, figure)
    folder = loading.resolve_model(model)
    quiet_libraries()
    config = loading.load_config(folder)
    fields = options.plan_fields(page_size, budget_pages, recent_pages, sink_pages)
    wish = _wish(config, fields, dense_layers, delta_layers, attended_fraction, recall)
    from deltadecode.lab.calibration.fit import Measurement
    from deltadecode.lab.calibration.report import report
    from deltadecode.lab.calibration.texts import make_prompts, read_texts, task_texts
    from deltadecode.lab.tasks.registry import make_task

    texts = None if data is None else read_texts(data, samples)
    text_task = None if task is None else make_task(task)
    tokenizer = loading.load_tokenizer(folder)
    loaded = loading.load_model(folder, dtype, loading.find_device(device))
    if text_task is not None:
        texts = task_texts(text_task, tokenizer, samples or _SAMPLES)
    assert texts is not None
    prompts = make_prompts(loaded, tokenizer, texts, new_tokens, chat=chat)
    measurement = Measurement(loaded, prompts, wish, new_tokens)
    with progress_bar("calibration", 1.0) as (bar, bar_task):
        show = progress_reporter(bar, bar_task)
        measurement.run(
            loaded, tokenizer, lambda done, left: show("calibration", done, left),
            stride=stride, batch=batch,
        )  # fmt: skip
    result = report(measurement)
    if as_json:
        print_json({"model": model, **result})
    else:
        stdout().print(_table(result))
    outputs: list[tuple[Path, Callable[[], str]]] = []
    if out is not None:
        source = str(task) if data is None else data.name
        outputs.append((out, lambda: _save(out, result, loaded, model, source)))
    if figure is not None:
        outputs.append((figure, lambda: _draw(figure, result)))
    write_each(*outputs)


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


def _wish(
    config: Any, fields: dict[str, Any], dense: int | None, deltas: int | None,
    fraction: float | None, recall: float | None,
) -> Any:  # fmt: skip
    from deltadecode.lab.calibration.fit import PlanRequest

    base = loading.make_plan(config, None, fields)
    dense_count = len(base.dense_layers) if dense is None else dense
    wish = PlanRequest(base, dense_count, deltas, fraction, recall)
    if fraction is not None and deltas is None and dense is not None:
        raise BadInput("--attended-fraction alone chooses dense layers; leave --dense-layers out")
    wish.check(len(attention_layers(config)))
    return wish


def _table(result: dict[str, Any]) -> Table:
    title = f"{result['texts']} texts, {result['observed_steps']} steps"
    table = Table(title=title, title_justify="left")
    for name in ("plan", "dense", "Δ", "K L S", "kept: fit", "held out", "reads"):
        left = name in ("plan", "dense", "Δ")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "Δ")
    for name, plan in result["plans"].items():
        table.add_row(name, *_cells(plan))
    best = result["offers"][0] if result["offers"] else None
    if best and best["kept"]["fit"] > result["plans"]["calibrated"]["kept"]["fit"]:
        table.add_row("with other L, S", *_cells(best))
    return table


def _cells(plan: dict[str, Any]) -> list[str]:
    return [
        " ".join(map(str, plan["dense_layers"])) or "–",
        " ".join(map(str, plan["delta_layers"])),
        f"{plan['budget_pages']} {plan['recent_pages']} {plan['sink_pages']}",
        f"{plan['kept']['fit']:.4f}",
        f"{plan['kept']['held_out']:.4f}",
        f"{plan['attended_fraction']:.1%}",
    ]
