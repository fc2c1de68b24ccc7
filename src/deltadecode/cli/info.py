"""``deltadecode info``: versions, devices, backends, and the plan of a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from deltadecode.architecture import (
    attention_layers,
    longest_prompt,
    num_layers,
    signature,
    text_config,
)
from deltadecode.cli import options
from deltadecode.cli.loading import load_config, make_plan, resolve_model
from deltadecode.cli.output import print_json, quiet_libraries, stdout
from deltadecode.config import DeltaConfig, LayerPlan
from deltadecode.profiles import find_profile

# Tokens of the cache that a model is shown with, where it has as many positions.
_CONTEXT = 131072
Context = Annotated[
    int | None,
    typer.Option(
        min=1, show_default=f"the model's positions, {_CONTEXT} at most",
        help="Tokens of a sequence to count the bytes of its cache for.",
    ),
]  # fmt: skip


def info(
    model: options.OptionalModel = None,
    context: Context = None,
    kv_dtype: options.KvDtype = None,
    as_json: options.AsJson = False,
) -> None:
    """Show versions, devices and backends, and the layer plan that a model would get."""
    folder = None if model is None else resolve_model(model)
    quiet_libraries()
    from deltadecode.lab.collect_env import backends, devices, machine, versions

    facts: dict[str, Any] = {
        "versions": versions(),
        "machine": machine(),
        "devices": devices(),
        "backends": backends(),
    }
    if folder is not None:
        facts["model"] = _describe(folder, context, kv_dtype)
    if as_json:
        print_json(facts)
        return
    console = stdout()
    console.print(_facts_table(facts))
    if folder is not None:
        console.print()
        console.print(_plan_line(facts["model"]), soft_wrap=True)
        console.print(_plan_table(facts["model"]))
        if facts["model"]["cache"] is not None:
            console.print(_cache_line(facts["model"]["cache"]), soft_wrap=True)
        if facts["model"]["beyond_positions"]:
            positions = facts["model"]["positions"]
            console.print(f"{context:,} tokens are more than the model's {positions:,} positions")
        line = _refused_line(facts["model"], kv_dtype)
        if line is not None:
            console.print(line, soft_wrap=True)


def layers_by_role(plan: LayerPlan) -> list[dict[str, Any]]:
    """Layers of a plan together by role and source, with what they read, by first layer."""
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


def _describe(folder: str, context: int | None, kv_dtype: str | None) -> dict[str, Any]:
    config = load_config(folder)
    cfg = make_plan(config, None, {})
    text = text_config(config)
    plan = cfg.layer_plan(num_layers(text), attention_layers(config))
    profile = find_profile(signature(config))
    from deltadecode.engines.transformers.offload_size import cache_bytes

    positions = longest_prompt(text)
    tokens = min(positions or _CONTEXT, _CONTEXT) if context is None else context
    held = cache_bytes(config, cfg, plan, tokens, kv_dtype)
    refused, offload_refused = _refused(config, cfg, kv_dtype)
    cache = None if held is None or refused is not None else asdict(held)
    if cache is not None and offload_refused is not None:
        cache.update(offloaded_device=None, offloaded_host=None)
    return {
        "class": type(text).__name__,
        "layers": num_layers(text),
        "positions": positions,
        "beyond_positions": positions is not None and tokens > positions,
        "plan_from": "default" if profile is None else "profile",
        "config": asdict(cfg),
        "roles": layers_by_role(plan),
        "cache": cache,
        "cache_refused": refused,
        "offload_refused": offload_refused,
    }


def _refused(config: Any, cfg: DeltaConfig, kv_dtype: str | None) -> tuple[str | None, str | None]:
    """Why a model has no default and no offloaded cache of this type; None for one that it has."""
    from deltadecode.engines.transformers.cache import DeltaCache
    from deltadecode.engines.transformers.offload import DeltaOffloadedCache

    reasons: list[str | None] = []
    for kind, plan in ((DeltaCache, ()), (DeltaOffloadedCache, (cfg,))):
        try:
            kind(config, *plan, kv_dtype=kv_dtype)
        except ValueError as error:  # ours, or of Transformers' own cache
            reasons.append(str(error))
        else:
            reasons.append(None)
    return reasons[0], reasons[1]


def _facts_table(facts: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, version in facts["versions"].items():
        table.add_row(name, version)
    machine = facts["machine"]
    table.add_row("cpu", f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_capability']}")
    table.add_row("memory", f"{machine['memory_gib']} GiB")
    table.add_row("gpus", ", ".join(machine["gpus"]) or "none")
    table.add_row("devices", ", ".join(facts["devices"]))
    table.add_row(
        "backends", ", ".join(f"{name} ({where})" for name, where in facts["backends"].items())
    )
    return table


def _plan_line(model: dict[str, Any]) -> str:
    kind = "calibrated profile" if model["plan_from"] == "profile" else "default plan"
    names = ("page_size", "budget_pages", "budget_share", "recent_pages", "sink_pages")
    values = {name: model["config"][name] for name in names}
    if not values["budget_share"]:
        del values["budget_share"]
    numbers = ", ".join(f"{name} {value}" for name, value in values.items())
    return f"{model['class']}, {model['layers']} layers, {kind}: {numbers}"


def _cache_line(held: dict[str, Any]) -> str:
    line = (
        f"cache of a sequence of {held['tokens']:,} tokens, planned layers: "
        f"{_size(held['device'])} on the GPU"
    )
    if held["offloaded_device"] is None:
        return line
    ours, host = _size(held["offloaded_device"]), _size(held["offloaded_host"])
    return f"{line}; offloaded: {ours} on the GPU and {host} on the host"


def _refused_line(model: dict[str, Any], kv_dtype: str | None) -> str | None:
    of_type = "" if kv_dtype is None else f" of {kv_dtype}"
    if model["cache_refused"] is not None:
        return f"no cache{of_type}: {model['cache_refused']}"
    if model["offload_refused"] is not None:
        return f"no offloaded cache{of_type}: {model['offload_refused']}"
    return None


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _plan_table(model: dict[str, Any]) -> Table:
    table = Table()
    for name in ("role", "reads", "layers"):
        table.add_column(name)
    for entry in model["roles"]:
        table.add_row(entry["role"], entry["reads"], ranges(entry["layers"]))
    return table


def ranges(numbers: list[int]) -> str:
    """Write ascending numbers, one at least, shortly: ``"0, 1, 3-13"``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(
        f"{part[0]}-{part[-1]}" if len(part) > 2 else ", ".join(map(str, part)) for part in parts
    )
