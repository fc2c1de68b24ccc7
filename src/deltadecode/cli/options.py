"""Options that several commands share, each declared once.

Values that can be checked alone are checked here, while the command line is read: before anything
is loaded, and for every command alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deltadecode.cli.files import check_file, check_folder, picture_file
from deltadecode.cli.output import BadInput, check_tag
from deltadecode.config import KV_DTYPES, MOST_DRAFTS

EMBEDDED, SMOLLM2, CLSA = "embedded", "smollm2", "clsa"
LARGEST_SEED = 2**32 - 1  # of NumPy's generator, which Transformers seeds too
FIRST_PROBLEM = 3_000_000_000  # seed of evaluations, apart from those of training and calibration
_LARGEST_COUNT = 2**31 - 1  # page ids are int32
_DTYPES = ("float32", "bfloat16", "float16", "auto")
PLAN_PANEL, _SAMPLING = "DELTA", "Sampling"  # of --help


def parse_layers(option: str, value: str | None) -> tuple[int, ...] | None:
    """Layer numbers from ``"2,14,22"``; an empty text is no layer, None was not typed."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")] if value.strip() else []
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise BadInput(f"{option} must be layer numbers with commas between, got {value!r}")
    return tuple(int(part) for part in parts)


def plan_fields(
    page_size: int | None,
    budget_pages: int | None,
    recent_pages: int | None,
    sink_pages: int | None,
    dense_layers: str | None = None,
    delta_layers: str | None = None,
    budget_share: float | None = None,
) -> dict[str, Any]:
    """Fields of a DeltaConfig as they were typed; None: not typed."""
    return {
        "page_size": page_size,
        "budget_pages": budget_pages,
        "budget_share": budget_share,
        "recent_pages": recent_pages,
        "sink_pages": sink_pages,
        "dense_layers": parse_layers("--dense-layers", dense_layers),
        "delta_layers": parse_layers("--delta-layers", delta_layers),
    }


def check_text(name: str, text: str) -> None:
    """Refuse text that has no UTF-8: bytes of another encoding arrive as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = text[error.start]
        raise BadInput(
            f"{name} is not UTF-8 text: got {bad!r} at character {error.start}"
        ) from None


def _name(param: typer.CallbackParam) -> str:
    return max(param.opts, key=len)


def _text(param: typer.CallbackParam, value: str | None) -> str | None:
    if value is not None:
        check_text(_name(param), value)
    return value


def _dtype(value: str) -> str:
    if value not in _DTYPES:
        raise BadInput(f"--dtype must be float32, bfloat16, float16 or auto, got {value!r}")
    return value


def _kv_dtype(value: str | None) -> str | None:
    if value is not None and value not in KV_DTYPES:
        raise BadInput(f"--kv-dtype must be {' or '.join(KV_DTYPES)}, got {value!r}")
    return value


def _tag(value: str | None) -> str | None:
    check_tag(value)
    return value


def _path(value: str | Path) -> Path:
    if not str(value):
        # The parser is the last to see it: an empty path is the current folder.
        raise typer.BadParameter("must not be empty, got ''")
    return Path(value)


def _file(param: typer.CallbackParam, value: Path | None) -> Path | None:
    return value if value is None else check_file(_name(param), value)


def _picture(param: typer.CallbackParam, value: Path | None) -> Path | None:
    return value if value is None else picture_file(_name(param), value)


def _folder(param: typer.CallbackParam, value: Path | None) -> Path | None:
    return value if value is None else check_folder(_name(param), value)


# What a command works on
MODEL_HELP = f"Folder or hub name of a model, '{EMBEDDED}' or '{SMOLLM2}'."
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
# Also one that DELTA has no part in.
AnyModel = Annotated[
    str, typer.Argument(help=f"Folder or hub name, '{EMBEDDED}', '{SMOLLM2}' or '{CLSA}'.")
]
OptionalModel = Annotated[str | None, typer.Argument(help=MODEL_HELP)]
Dtype = Annotated[
    str, typer.Option(help="auto: that of the checkpoint.", metavar="|".join(_DTYPES),
                      callback=_dtype)
]  # fmt: skip
Device = Annotated[str, typer.Option(help="As PyTorch names it; auto: the first GPU, else cpu.")]
PromptArgument = Annotated[
    str | None,
    typer.Argument(help="The prompt; '-' or none: read it from stdin.", callback=_text),
]
PromptOption = Annotated[
    str | None,
    typer.Option("--prompt", help="The prompt; '-': read it from stdin.", callback=_text),
]
PromptFile = Annotated[
    Path | None, typer.Option(help="Read the prompt from a file.", parser=_path, metavar="FILE")
]
System = Annotated[str | None, typer.Option(help="System message of the chat.", callback=_text)]
NoChatTemplate = Annotated[
    bool, typer.Option("--no-chat-template", help="Give the model the bare prompt.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Use the chat template.")]
NewTokens = Annotated[int, typer.Option(min=1, max=_LARGEST_COUNT, help="Most tokens to write.")]
Batch = Annotated[int, typer.Option(min=1, help="Texts or problems that are decoded together.")]

# Seeds and sampling
SamplingSeed = Annotated[
    int, typer.Option(min=0, max=LARGEST_SEED, help="Of sampling.", rich_help_panel=_SAMPLING)
]
ProblemSeed = Annotated[
    int, typer.Option(min=0, max=LARGEST_SEED, help="Of the task's first problem.")
]
FreshSeed = Annotated[
    int | None,
    typer.Option(min=0, max=LARGEST_SEED, help="Of the problem; default: a fresh one."),
]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="0: the likeliest token.", rich_help_panel=_SAMPLING)
]
TopP = Annotated[float, typer.Option(help="Nucleus, in (0, 1].", rich_help_panel=_SAMPLING)]

# The plan
PlanFile = Annotated[
    Path | None,
    typer.Option(
        help="DeltaConfig as JSON.", rich_help_panel=PLAN_PANEL, parser=_path, metavar="FILE"
    ),
]
PageSize = Annotated[
    int | None,
    typer.Option(max=_LARGEST_COUNT, help="Tokens of a page.", rich_help_panel=PLAN_PANEL),
]
BudgetPages = Annotated[
    int | None,
    typer.Option(
        max=_LARGEST_COUNT, help="Pages that a sparse layer reads.", rich_help_panel=PLAN_PANEL
    ),
]
BudgetShare = Annotated[
    float | None,
    typer.Option(
        help="This share of a row's pages, where that is more.", rich_help_panel=PLAN_PANEL
    ),
]
RecentPages = Annotated[
    int | None,
    typer.Option(max=_LARGEST_COUNT, help="Last pages, always read.", rich_help_panel=PLAN_PANEL),
]
SinkPages = Annotated[
    int | None,
    typer.Option(max=_LARGEST_COUNT, help="First pages, always read.", rich_help_panel=PLAN_PANEL),
]
DenseLayers = Annotated[str | None, typer.Option(help="Such as 0,1.", rich_help_panel=PLAN_PANEL)]
DeltaLayers = Annotated[
    str | None, typer.Option(help="Such as 2,14,22.", rich_help_panel=PLAN_PANEL)
]
Full = Annotated[
    bool, typer.Option("--full", help="Full attention only.", rich_help_panel=PLAN_PANEL)
]
Lossless = Annotated[
    bool,
    typer.Option(
        "--lossless",
        help="Sparse steps only draft, and full attention verifies: its text, exactly.",
        rich_help_panel=PLAN_PANEL,
    ),
]
DraftTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_DRAFTS,
        help="With --lossless: drafts before a verification; by default as many as pay.",
        rich_help_panel=PLAN_PANEL,
    ),
]
KvDtype = Annotated[
    str | None,
    typer.Option(
        help="Keys and values in eight bits; by default the model's type.",
        metavar="|".join(KV_DTYPES), rich_help_panel=PLAN_PANEL, callback=_kv_dtype,
    ),
]  # fmt: skip
Compare = Annotated[
    bool,
    typer.Option(
        "--compare", help="Then full attention too, and compare.", rich_help_panel=PLAN_PANEL
    ),
]

# Where results go
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
PlanOutput = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", help="Write the plan here, as JSON.", parser=_path, callback=_file,
        metavar="FILE",
    ),
]  # fmt: skip
Picture = Annotated[
    Path | None,
    typer.Option(
        help="Draw the shift curve with both plans; a PNG if the name has no suffix.",
        parser=_path, callback=_picture, metavar="FILE",
    ),
]  # fmt: skip
ReportFolder = Annotated[
    Path,
    typer.Option(
        "--out", "-o", help="Folder of the page, the figures and the numbers.", parser=_path,
        callback=_folder, metavar="FOLDER",
    ),
]  # fmt: skip
# Checked when it is used: a report alone needs no folder of samples.
SamplesFolder = Annotated[
    Path, typer.Option("--out", help="Folder of the samples' files.", parser=_path,
                       metavar="FOLDER")
]  # fmt: skip
Results = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the result file, <command>-<date>-<tag>.json.", parser=_path,
        callback=_folder, metavar="FOLDER",
    ),
]  # fmt: skip
Tag = Annotated[str | None, typer.Option(help="Last part of the result's name.", callback=_tag)]
