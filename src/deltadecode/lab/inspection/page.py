"""The report as one HTML page that needs neither a server nor a network. Needs Plotly."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltadecode.lab.inspection.pages import PageMap

_HERE = Path(__file__).resolve().parent / "assets"
_WIDEST = 1024  # pages of the drawn map; more would be finer than a screen
_FLOOR = -5.0  # log10 of the least attention mass that is told from none


def write_page(report: dict[str, Any], pages: PageMap, path: Path) -> None:
    """Write the page.

    The page map is an image of bytes: log10 of the mass from 1e-5 to 1 in 250 steps. Beyond 1,024
    pages, neighbours are put together: masses add up, and one selected page marks the whole.
    """
    from plotly.offline import get_plotlyjs

    data = {"report": report, "map": drawn_map(pages)}
    name = report["model"]["name"]
    parts = {
        "{{title}}": html.escape(f"{name}: what its attention does"),
        "{{style}}": _asset("page.css"),
        "{{plotly}}": get_plotlyjs(),
        "{{data}}": _json(data),
        "{{script}}": _asset("page.js"),
    }
    text = _asset("page.html")
    # Piece by piece: what is put in must not be searched for further marks.
    written = []
    for mark, part in parts.items():
        before, text = text.split(mark, 1)
        written += [before, part]
    path.write_text("".join([*written, text]), encoding="utf-8")


def drawn_map(pages: PageMap) -> dict[str, Any]:
    """The page map as the page holds it.

    ``shape`` [steps, layers, drawn pages]; ``pooled`` pages of one drawn one; ``floor``, the log10
    of level 0, level 250 being 0; ``steps`` and ``lengths``; and in base64 ``levels``, a byte each,
    and ``selected``, a bit each.
    """
    pooled = -(-pages.mass.shape[2] // _WIDEST)
    mass = _pool(pages.mass, pooled).sum(axis=3)
    levels = np.log10(np.maximum(mass, 1e-30))
    levels = np.clip((levels - _FLOOR) / -_FLOOR * 250, 0, 250).round().astype(np.uint8)
    selected = _pool(pages.selected, pooled).any(axis=3)
    return {
        "shape": list(levels.shape),
        "pooled": pooled,
        "floor": _FLOOR,
        "steps": pages.steps.tolist(),
        "lengths": pages.lengths.tolist(),
        "levels": base64.b64encode(levels.tobytes()).decode(),
        "selected": base64.b64encode(np.packbits(selected.reshape(-1)).tobytes()).decode(),
    }


def _pool(values: NDArray[Any], by: int) -> NDArray[Any]:
    steps, layers, pages = values.shape
    padded = np.pad(values, ((0, 0), (0, 0), (0, -pages % by)))
    return padded.reshape(steps, layers, -1, by)


def _json(data: dict[str, Any]) -> str:
    # Inside of <script>: a token may be "</script>".
    return json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
