"""Options that choose a plan, the same for every command that has them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PANEL = "DELTA"

PlanFile = Annotated[Path | None, typer.Option(help="DeltaConfig as JSON.", rich_help_panel=PANEL)]
PageSize = Annotated[int | None, typer.Option(help="Tokens of a page.", rich_help_panel=PANEL)]
BudgetPages = Annotated[
    int | None, typer.Option(help="Pages that a sparse layer reads.", rich_help_panel=PANEL)
]
RecentPages = Annotated[
    int | None, typer.Option(help="Last pages, always read.", rich_help_panel=PANEL)
]
SinkPages = Annotated[
    int | None, typer.Option(help="First pages, always read.", rich_help_panel=PANEL)
]
DenseLayers = Annotated[str | None, typer.Option(help="Such as 0,1.", rich_help_panel=PANEL)]
DeltaLayers = Annotated[str | None, typer.Option(help="Such as 2,14,22.", rich_help_panel=PANEL)]
