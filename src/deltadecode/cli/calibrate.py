"""``deltadecode calibrate``: the layer plan of a model, from what its attention does."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from deltadecode.architecture import attention_layers
from deltadecode.cli.loading import (
    EMBEDDED,
    check_model_path,
    checked_dtype,
    find_device,
    load_config,
    load_model,
    load_tokenizer,
    make_plan,
    model_folder,
)
from deltadecode.cli.output import (
    BadInput,
    note,
    print_json,
    progress_bar,
    quiet_libraries,
    stdout,
    teller,
)
from deltadecode.cli.plan_options import BudgetPages, PageSize, RecentPages, SinkPages

_SAMPLES = 16


def calibrate(
    model: Annotated[str, typer.Argument(help=f"Folder or hub name of a model, or '{EMBEDDED}'.")],
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
    page_size: PageSize = None,
    budget_pages: BudgetPages = None,
    recent_pages: RecentPages = None,
    sink_pages: SinkPages = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate for each text.")] = 192,
    stride: Annotated[int, typer.Option(min=1, help="Look at every so manieth step.")] = 7,
    batch: Annotated[int, typer.Option(min=1, help="Texts that are decoded together.")] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="As PyTorch names it, or auto.")] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the plan here, as JSON.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the shift curve with both plans; a PNG file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Measure a model's attention, and choose its dense and Δ-layers.

    The model continues each text with full attention. Two plans are fitted on half of the texts:
    the one that keeps most of the attention that layers need, and the paper's (peaks of the shift
    between layers); both are judged on the other half. With --attended-fraction alone, the numbers
    of dense and Δ-layers and of pages are chosen too.
    """
    if (data is None) == (task is None):
        raise BadInput("give either --data FILE or --task NAME")
    for path in (out, figure):
        if path is not None and not path.resolve().parent.is_dir():
            raise BadInput(f"the folder of {str(path)!r} does not exist")
    if figure is not None and importlib.util.find_spec("matplotlib") is None:
        raise BadInput("--figure needs matplotlib: pip install 'deltadecode[lab]'")
    folder = model_folder(model)
    check_model_path(folder)
    quiet_libraries()
    config = load_config(folder)
    given = {
        "page_size": page_size, "budget_pages": budget_pages, "recent_pages": recent_pages,
        "sink_pages": sink_pages,
    }  # fmt: skip
    wish = _wish(config, given, dense_layers, delta_layers, attended_fraction, recall)
    from deltadecode.lab.calibration.fit import Measurement
    from deltadecode.lab.calibration.report import plan_file, report
    from deltadecode.lab.calibration.texts import make_prompts, read_texts, task_texts
    from deltadecode.lab.tasks.registry import make_task

    texts = None if data is None else read_texts(data, samples)
    kind = None if task is None else make_task(task)
    tokenizer = load_tokenizer(folder)
    loaded = load_model(folder, checked_dtype(dtype), find_device(device))
    if kind is not None:
        texts = task_texts(kind, tokenizer, samples or _SAMPLES)
    assert texts is not None
    prompts = make_prompts(loaded, tokenizer, texts, new_tokens, chat=chat)
    found = Measurement(loaded, prompts, wish, new_tokens)
    with progress_bar("calibration", 1.0) as (bar, shown):
        tell = teller(bar, shown)
        found.run(
            loaded, tokenizer, lambda done, left: tell("calibration", done, left),
            stride=stride, batch=batch,
        )  # fmt: skip
    said = report(found)
    if out is not None:
        command = shlex.join(["deltadecode", *sys.argv[1:]])
        source = str(task) if data is None else data.name
        cfg, meta = plan_file(said, loaded, model, source, command)
        cfg.save(out, meta=meta)
        note(f"wrote {out}; use it with --plan {out}, or DeltaConfig.load")
    if figure is not None:
        from deltadecode.lab.calibration.figures import draw

        draw(said, figure)
        note(f"wrote {figure}")
    if as_json:
        print_json({"model": model, **said})
    else:
        _show(said)


def _wish(
    config: Any, given: dict[str, Any], dense: int | None, deltas: int | None,
    fraction: float | None, recall: float | None,
) -> Any:  # fmt: skip
    from deltadecode.lab.calibration.fit import PlanRequest

    base = make_plan(config, None, given)
    dense_count = len(base.dense_layers) if dense is None else dense
    wish = PlanRequest(base, dense_count, deltas, fraction, recall)
    if fraction is not None and deltas is None and dense is not None:
        raise BadInput("--attended-fraction alone chooses dense layers; leave --dense-layers out")
    wish.check(len(attention_layers(config)))
    return wish


def _show(said: dict[str, Any]) -> None:
    shown = Table(
        title=f"{said['texts']} texts, {said['observed_steps']} steps", title_justify="left"
    )
    for name in ("plan", "dense", "Δ", "K L S", "kept: fit", "held out", "reads"):
        left = name in ("plan", "dense", "Δ")
        shown.add_column(name, justify="left" if left else "right", no_wrap=name != "Δ")
    for name, plan in said["plans"].items():
        shown.add_row(name, *_cells(plan))
    best = said["offers"][0] if said["offers"] else None
    if best and best["kept"]["fit"] > said["plans"]["calibrated"]["kept"]["fit"]:
        shown.add_row("with other L, S", *_cells(best))
    stdout().print(shown)


def _cells(plan: dict[str, Any]) -> list[str]:
    return [
        " ".join(map(str, plan["dense_layers"])) or "–",
        " ".join(map(str, plan["delta_layers"])),
        f"{plan['budget_pages']} {plan['recent_pages']} {plan['sink_pages']}",
        f"{plan['kept']['fit']:.4f}",
        f"{plan['kept']['held_out']:.4f}",
        f"{plan['attended_fraction']:.1%}",
    ]
