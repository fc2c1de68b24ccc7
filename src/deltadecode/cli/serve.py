"""``deltadecode serve``: vLLM's server with DELTA, by the line that anyone could type."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deltadecode.cli.output import BadInput, note, print_json
from deltadecode.integrations.vllm import own_settings

_DELTA = "DELTA"
_OTHER = "--additional-config"


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="What vllm serve takes: a folder or a hub name.")],
    plan: Annotated[
        Path | None, typer.Option(help="DeltaConfig as JSON.", rich_help_panel=_DELTA)
    ] = None,
    page_size: Annotated[
        int | None, typer.Option(help="Tokens of a page.", rich_help_panel=_DELTA)
    ] = None,
    budget_pages: Annotated[
        int | None, typer.Option(help="Pages that a sparse layer reads.", rich_help_panel=_DELTA)
    ] = None,
    recent_pages: Annotated[
        int | None, typer.Option(help="Last pages, always read.", rich_help_panel=_DELTA)
    ] = None,
    sink_pages: Annotated[
        int | None, typer.Option(help="First pages, always read.", rich_help_panel=_DELTA)
    ] = None,
    sync_heads: Annotated[
        bool | None,
        typer.Option(
            "--sync-heads",
            help="Tensor parallel: select over the heads of all ranks.",
            rich_help_panel=_DELTA,
        ),
    ] = None,
    stock_if_unsupported: Annotated[
        bool,
        typer.Option(
            "--stock-if-unsupported",
            help="Serve a model that has nothing to plan with stock attention.",
            rich_help_panel=_DELTA,
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the line and stop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the line as a JSON object and stop.")
    ] = False,
) -> None:
    """Serve a model with vLLM and DELTA. All other options go to vllm serve as they are."""
    given: dict[str, Any] = {
        "plan": None if plan is None else str(plan.resolve()),
        "page_size": page_size,
        "budget_pages": budget_pages,
        "recent_pages": recent_pages,
        "sink_pages": sink_pages,
        "sync_heads": sync_heads,
        "on_unsupported": "stock" if stock_if_unsupported else None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if plan is not None and not plan.is_file():
        raise BadInput(f"--plan {str(plan)!r} does not exist")
    own_settings(given)
    command = command_of(model, given, context.args)
    if as_json:
        print_json({"command": command, "deltadecode": given})
        return
    line = shlex.join(command)
    if dry_run:
        typer.echo(line)
        return
    program = find_vllm()
    note(line)
    os.execv(program, command)


def command_of(model: str, given: dict[str, Any], rest: list[str]) -> list[str]:
    """The words of a ``vllm serve`` line.

    Parameters
    ----------
    model : str
        As it was typed.
    given : dict
        The ``deltadecode`` object of ``--additional-config``.
    rest : list of str
        Options of ``vllm serve``.

    Returns
    -------
    list of str

    Raises
    ------
    BadInput
        When an ``--additional-config`` among them is no JSON object.
    """
    rest = list(rest)
    additional: dict[str, Any] = {}
    for place, word in enumerate(rest):
        name, equals, text = word.partition("=")
        if name != _OTHER:
            continue
        used = 1 if equals else 2
        text = text if equals else (rest[place + 1] if place + 1 < len(rest) else "")
        try:
            additional = json.loads(text)
        except ValueError as error:
            raise BadInput(f"{_OTHER} must be a JSON object, got {text!r}") from error
        if not isinstance(additional, dict):
            raise BadInput(f"{_OTHER} must be a JSON object, got {text!r}")
        del rest[place : place + used]
        break
    known = additional.get("deltadecode", {})
    if given and isinstance(known, dict):
        additional["deltadecode"] = {**known, **given}
    words = ["vllm", "serve", model, "--attention-backend", "CUSTOM"]
    if additional:
        words += [_OTHER, json.dumps(additional)]
    return [*words, *rest]


def find_vllm() -> str:
    """The program of vLLM in this environment.

    Returns
    -------
    str
        Its path.

    Raises
    ------
    BadInput
        When there is none.
    """
    beside = Path(sys.executable).with_name("vllm")
    program = str(beside) if beside.is_file() else shutil.which("vllm")
    if program is None:
        raise BadInput("vLLM is not installed; pip install 'deltadecode[vllm]' brings it")
    return program
