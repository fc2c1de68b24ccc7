"""``deltadecode serve``: ``vllm serve`` with DELTA switched on."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from deltadecode.cli import options
from deltadecode.cli.loading import load_config, make_plan, named_folder
from deltadecode.cli.output import BadInput, print_json, quiet_libraries
from deltadecode.config import DeltaConfig
from deltadecode.engines.serving.settings import KEY
from deltadecode.engines.vllm import BACKEND
from deltadecode.errors import UnsupportedModelError
from deltadecode_vllm import PROPOSER

# In vLLM a batch makes so many drafts, or none.
DRAFT_TOKENS = 4
# A start of so many letters may stand for one of vLLM's options.
_SHORTEST = len("--ad")
# Either of them makes a folder a model's, of Hugging Face or of Mistral.
_CONFIGS = ("config.json", "params.json")
# What is not ours is vLLM's. It has one-dash options of several letters, some with an h, and takes
# underscores for dashes, as ours do here.
SETTINGS = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": ["--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),
}


class OnUnsupported(str, Enum):
    """What the server does with a model that has nothing to plan."""

    error = "error"
    stock = "stock"


def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help=f"{options.MODEL_HELP} Options of 'vllm serve' may follow.")
    ],
    plan: options.PlanFile = None,
    page_size: options.PageSize = None,
    budget_pages: options.BudgetPages = None,
    budget_share: options.BudgetShare = None,
    recent_pages: options.RecentPages = None,
    sink_pages: options.SinkPages = None,
    dense_layers: options.DenseLayers = None,
    delta_layers: options.DeltaLayers = None,
    lossless: options.Lossless = False,
    draft_tokens: options.DraftTokens = None,
    sync_heads: Annotated[
        bool,
        typer.Option(
            "--sync-heads",
            help="Tensor-parallel ranks choose pages together.",
            rich_help_panel=options.PLAN_PANEL,
        ),
    ] = False,
    min_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="A step that sees fewer tokens reads every page.",
            rich_help_panel=options.PLAN_PANEL,
        ),
    ] = None,
    on_unsupported: Annotated[
        OnUnsupported | None,
        typer.Option(help="Of a model with nothing to plan.", rich_help_panel=options.PLAN_PANEL),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command and run nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: print one JSON object.")
    ] = False,
) -> None:
    """Serve a model with vLLM and DELTA: prints the 'vllm serve' line, and becomes it.

    Every other option goes to vLLM as it is. Without DELTA options the model gets its calibrated
    profile, or the default plan for its depth ('deltadecode info MODEL' shows it).
    """
    if model.startswith("-"):
        raise BadInput(f"MODEL comes before the options of vLLM, got {model!r} first")
    if as_json and not dry_run:
        raise BadInput("--json needs --dry-run: the server's output is its own")
    fields = options.plan_fields(
        page_size, budget_pages, recent_pages, sink_pages, dense_layers, delta_layers, budget_share
    )
    additional, rest = split_additional(context.args)
    folder = named_folder(model)
    check_place(folder, rest)
    settings = plan_settings(folder, plan, fields, on_unsupported, lossless=lossless)
    if sync_heads:
        settings["sync_heads"] = True
    if min_tokens is not None:
        settings["min_tokens"] = min_tokens
    if on_unsupported is not None:
        settings["on_unsupported"] = on_unsupported.value
    line = ["serve", folder, "--attention-backend", BACKEND]
    line += ["--additional-config", json.dumps(merged(additional, settings))]
    line += [*drafting(lossless, draft_tokens, rest), *rest]
    if folder != model and not any(_names(each, "--served-model-name") for each in rest):
        line += ["--served-model-name", model]
    if dry_run:
        command = ["vllm", *line]
        if as_json:
            print_json({"command": command})
        else:
            print(shlex.join(command))
        return
    if importlib.util.find_spec("vllm") is None:
        raise BadInput("vLLM is not installed: pip install 'deltadecode[vllm]'")
    command = [*vllm_command(), *line]
    print(shlex.join(command), file=sys.stderr, flush=True)
    os.execvp(command[0], command)


def drafting(lossless: bool, draft_tokens: int | None, rest: Sequence[str]) -> list[str]:
    """Arguments by which vLLM drafts and verifies; none without lossless mode."""
    if not lossless:
        if draft_tokens is not None:
            raise BadInput("--draft-tokens needs --lossless")
        return []
    for argument in rest:
        # --speculative-config, parts of it, and all that vLLM takes for them.
        if _option(argument).startswith("--spec") or _names(argument, "-sc"):
            raise BadInput(f"--lossless drafts by itself; leave {argument!r} out")
    drafts = {"method": "custom_class", "model": PROPOSER}
    count = DRAFT_TOKENS if draft_tokens is None else draft_tokens
    return ["--speculative-config", json.dumps({**drafts, "num_speculative_tokens": count})]


def split_additional(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Value of ``--additional-config`` among vLLM's arguments, and the others in order."""
    values: list[str] = []
    rest: list[str] = []
    waiting = iter(enumerate(arguments, 1))
    for after, argument in waiting:
        _, equals, value = argument.partition("=")
        if not equals:
            value = next(iter(arguments[after:]), "")
        if _names(argument, "--attention-backend") or _has_backend(argument, value):
            raise BadInput(f"--attention-backend is {BACKEND} with DELTA, got {argument!r} too")
        if not _names(argument, "--additional-config"):
            rest.append(argument)
            continue
        # vLLM takes a path of keys after a dot.
        if "." in _option(argument):
            # vLLM would make a second object of it, which replaces the one with our settings.
            raise BadInput(f"--additional-config must be one JSON object here, got {argument!r}")
        values.append(value)
        if not equals:
            next(waiting, None)
    if len(values) > 1:
        raise BadInput(f"--additional-config must be given once, got {values[1]!r} too")
    return (_json_object(values[0]) if values else {}), rest


def merged(additional: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Put our settings into vLLM's additional config; other settings of ours there are refused."""
    theirs = additional.get(KEY, settings)
    if theirs != settings:
        raise BadInput(
            f"give DELTA's settings as options, not as {KEY!r} in --additional-config; got "
            f"{json.dumps(theirs)} there and {json.dumps(settings)} as options"
        )
    return {**additional, KEY: settings}


def plan_settings(
    model: str,
    plan: Path | None,
    fields: dict[str, Any],
    on_unsupported: OnUnsupported | None,
    *,
    lossless: bool = False,
) -> dict[str, Any]:
    """Settings for the plugin, checked as far as that can be done before the model is loaded.

    All fields of the file's configuration with what was typed in their place, or what was typed
    alone: the plugin completes it for the model.
    """
    typed = {name: value for name, value in fields.items() if value is not None}
    if plan is not None:
        settings = replace(DeltaConfig.load(plan), **typed).to_dict()
    else:
        # What a hub's model would complete it with is not known here, so layers are checked alone.
        layers = {"dense_layers": (), "delta_layers": ()}
        checked = DeltaConfig(**{**layers, **typed}).to_dict()
        settings = {name: checked[name] for name in typed}
    # Not Path.is_file, which raises for a name that is too long to be one.
    if not os.path.isfile(os.path.join(model, "config.json")):
        return settings
    quiet_libraries()
    try:
        config = load_config(model)
    except BadInput:
        return settings  # vLLM knows models that Transformers does not
    try:
        make_plan(config, plan, fields)
    except UnsupportedModelError as error:
        if lossless:  # stock attention has nothing to draft with
            raise
        if on_unsupported is not OnUnsupported.stock:
            raise UnsupportedModelError(
                f"{error}; --on-unsupported stock serves it without DELTA"
            ) from error
    return settings


def vllm_command() -> list[str]:
    """The start of the command that runs vLLM in this environment.

    The script ``vllm``, or this Python and vLLM's module where no script of this environment is on
    the PATH: another environment's vLLM would not find the plugin.
    """
    script = shutil.which("vllm")
    if script is not None and Path(script).parent == Path(sys.executable).parent:
        return ["vllm"]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def check_place(model: str, rest: Sequence[str]) -> None:
    """Refuse a path at which vLLM finds no model: it says so at the end of a traceback."""
    path = Path(model)
    if os.path.isdir(model):
        elsewhere = any(_names(each, "--hf-config-path") for each in rest)
        known = any(os.path.isfile(path / name) for name in _CONFIGS)
        if not (known or elsewhere or any(path.glob("*.gguf"))):
            raise BadInput(f"{model!r} is not a model folder: it has no config.json")
    elif not model or (model.startswith(("/", ".", "~")) and not os.path.exists(model)):
        raise BadInput(f"model path {model!r} does not exist")


def _option(argument: str) -> str:
    # vLLM takes underscores for dashes.
    return argument.partition("=")[0].replace("_", "-")


def _names(argument: str, option: str) -> bool:
    """Whether vLLM takes an argument for an option, or for a path of keys of its value.

    It takes the start of a name for the whole where no other begins so, and refuses it elsewhere.
    """
    name = _option(argument).partition(".")[0]
    return name == option or (len(name) >= _SHORTEST and option.startswith(name))


def _has_backend(argument: str, value: str) -> bool:
    """Whether vLLM finds an attention backend in an argument and the value behind it."""
    if not (_names(argument, "--attention-config") or _names(argument, "-ac")):
        return False
    return _option(argument).endswith(".backend") or '"backend"' in value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"--additional-config is not JSON: {error}, got {text!r}") from error
    if not isinstance(value, dict):
        raise BadInput(f"--additional-config must be a JSON object, got {text!r}")
    return value
