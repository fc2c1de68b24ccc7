"""``deltadecode info``: versions, devices, backends, and the plan of a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from deltadecode.architecture import attention_layers, num_layers, signature, text_config
from deltadecode.cli.loading import check_model_path, load_config, make_plan
from deltadecode.cli.output import print_json, quiet_libraries, stdout
from deltadecode.config import LayerPlan
from deltadecode.profiles import find_profile


def info(
    model: Annotated[
        str | None, typer.Argument(help="Folder of a Transformers model: show its plan.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show versions, devices and backends, and the layer plan that a model would get."""
    if model is not None:
        check_model_path(model)
    quiet_libraries()
    from deltadecode.lab.collect_env import backends, devices, machine, versions

    found: dict[str, Any] = {
        "versions": versions(),
        "machine": machine(),
        "devices": devices(),
        "backends": backends(),
    }
    if model is not None:
        found["model"] = _describe(model)
    if as_json:
        print_json(found)
        return
    console = stdout()
    console.print(_facts(found))
    if model is not None:
        console.print()
        console.print(_plan_line(found["model"]), soft_wrap=True)
        console.print(_plan_table(found["model"]))


def layers_by_role(plan: LayerPlan) -> list[dict[str, Any]]:
    """Put the layers of a plan together by role and source.

    Parameters
    ----------
    plan : LayerPlan
        Plan of a model.

    Returns
    -------
    list of dict
        ``role``, ``source``, what such layers read (``reads``) and their numbers (``layers``), by
        first layer.
    """
    reads = {
        "dense": "all tokens",
        "delta": "all tokens, and selects pages",
        "own": "as the model defines it",
    }
    groups: dict[tuple[str, int | None], list[int]] = {}
    for layer in range(plan.num_layers):
        groups.setdefault((plan.role(layer), plan.source(layer)), []).append(layer)
    return [
        {
            "role": role,
            "source": source,
            "reads": reads.get(role, f"the pages that layer {source} selects"),
            "layers": layers,
        }
        for (role, source), layers in groups.items()
    ]


def _describe(model: str) -> dict[str, Any]:
    config = load_config(model)
    cfg = make_plan(config, None, {})
    text = text_config(config)
    plan = cfg.layer_plan(num_layers(text), attention_layers(config))
    profile = find_profile(signature(config))
    return {
        "class": type(text).__name__,
        "layers": num_layers(text),
        "plan_from": "default" if profile is None else "profile",
        "config": asdict(cfg),
        "roles": layers_by_role(plan),
    }


def _facts(found: dict[str, Any]) -> Table:
    shown = Table.grid(padding=(0, 2))
    for name, version in found["versions"].items():
        shown.add_row(name, version)
    machine = found["machine"]
    shown.add_row("cpu", f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_capability']}")
    shown.add_row("memory", f"{machine['memory_gib']} GiB")
    shown.add_row("gpus", ", ".join(machine["gpus"]) or "none")
    shown.add_row("devices", ", ".join(found["devices"]))
    shown.add_row(
        "backends", ", ".join(f"{name} ({where})" for name, where in found["backends"].items())
    )
    return shown


def _plan_line(model: dict[str, Any]) -> str:
    kind = "calibrated profile" if model["plan_from"] == "profile" else "default plan"
    numbers = ("page_size", "budget_pages", "recent_pages", "sink_pages")
    shown = ", ".join(f"{name} {model['config'][name]}" for name in numbers)
    return f"{model['class']}, {model['layers']} layers, {kind}: {shown}"


def _plan_table(model: dict[str, Any]) -> Table:
    shown = Table()
    for name in ("role", "reads", "layers"):
        shown.add_column(name)
    for entry in model["roles"]:
        shown.add_row(entry["role"], entry["reads"], ranges(entry["layers"]))
    return shown


def ranges(numbers: list[int]) -> str:
    """Write ascending numbers shortly.

    Parameters
    ----------
    numbers : list of int
        Ascending, at least one.

    Returns
    -------
    str
        As in ``"0, 1, 3-13"``.
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(
        f"{part[0]}-{part[-1]}" if len(part) > 2 else ", ".join(map(str, part)) for part in parts
    )
