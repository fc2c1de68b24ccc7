"""The main figures as PNGs, from the report and the page map. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deltadecode.lab.inspection.names import FIGURE_FILES
from deltadecode.lab.inspection.pages import PageMap

COLORS = {"dense": "tab:gray", "delta": "tab:orange", "sparse": "tab:blue"}
_MARKERS = {"dense": "o", "delta": "D", "sparse": "o"}
_NAMES = {"dense": "dense", "delta": "Δ-layer", "sparse": "sparse"}


def draw(report: dict[str, Any], pages: PageMap, folder: Path) -> list[Path]:
    """Draw all figures, :data:`deltadecode.lab.inspection.names.FIGURE_FILES`."""
    written = []
    for name, (size, paint) in zip(FIGURE_FILES, _PAINTERS, strict=True):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure, report, pages)
        path = folder / name
        figure.savefig(path, dpi=110)
        written.append(path)
    return written


def _shift(figure: Figure, report: dict[str, Any], pages: PageMap) -> None:
    del pages
    axes, plan = figure.subplots(), report["plan"]
    layers, shift = report["layers"], report["shift"]
    axes.plot(layers[1:], shift[1:], color="lightgray", zorder=1)
    for layer, role, value in list(zip(layers, plan["roles"], shift, strict=True))[1:]:
        big = role == "delta"
        axes.scatter(
            layer, value, color=COLORS[role], marker="D" if big else "o", s=60 if big else 26
        )
    for layer in plan["delta_layers"]:
        axes.axvline(layer, color=COLORS["delta"], linestyle=":", zorder=0)
    kinds = [
        Line2D([], [], color=color, marker=_MARKERS[role], linestyle="", label=_NAMES[role])
        for role, color in COLORS.items()
        if role in plan["roles"]
    ]
    axes.legend(handles=kinds)
    axes.set(xlabel="layer", ylabel="1 − cos to the layer before",
             title="Where attention changes from one layer to the next")  # fmt: skip


def _recall(figure: Figure, report: dict[str, Any], pages: PageMap) -> None:
    del pages
    axes, rows = figure.subplots(), report["recall"]
    names = [str(row["layer"]) for row in rows]
    axes.bar(names, [row["best"] for row in rows], color="whitesmoke", edgecolor="gray",
             label="its own pages")  # fmt: skip
    axes.bar(names, [row["captured"] for row in rows], color=COLORS["sparse"],
             label="the plan's pages")  # fmt: skip
    axes.set(xlabel="sparse layer", ylabel="share of its attention", ylim=(0, 1.02),
             title="What the plan's pages hold of each sparse layer's attention")  # fmt: skip
    axes.legend(loc="lower right")


def _matrices(figure: Figure, report: dict[str, Any], pages: PageMap) -> None:
    del pages
    layers = report["layers"]
    titles = (("captured", "Attention captured"), ("overlap", "Pages in common (Jaccard)"))
    for axes, (key, title) in zip(figure.subplots(1, 2), titles, strict=True):
        image = axes.imshow(_array(report[key]), vmin=0, vmax=1, cmap="Blues")
        _ticks(axes.set_xticks, layers)
        _ticks(axes.set_yticks, layers)
        axes.set(title=title, xlabel="layer that reads", ylabel="layer that selects")
        figure.colorbar(image, ax=axes, shrink=0.8)


def _drift(figure: Figure, report: dict[str, Any], pages: PageMap) -> None:
    del pages
    drift = report["drift"]
    panels = (("overlap", "Pages in common (Jaccard)"), ("held", "Attention still held"))
    for axes, (key, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for layer in report["plan"]["delta_layers"]:
            axes.plot(drift["lags"], drift[key][str(layer)], label=f"layer {layer}")
        if key == "overlap" and drift["chance"] is not None:
            axes.axhline(drift["chance"], color="gray", linestyle=":", label="by chance")
        axes.set(title=title, xlabel="age of a Δ-layer's choice, decode steps", ylim=(0, 1.02))
        axes.legend()


def _map(figure: Figure, report: dict[str, Any], pages: PageMap) -> None:
    deltas = report["plan"]["delta_layers"] or report["layers"][:1]
    shown = [deltas[0], deltas[-1]] if len(deltas) > 1 else deltas
    norm = LogNorm(1e-5, 1)
    for axes, layer in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        place = report["layers"].index(layer)
        image = axes.imshow(
            np.maximum(pages.mass[:, place], 1e-9), norm=norm, cmap="Blues", aspect="auto",
            interpolation="nearest",
            extent=(-0.5, pages.mass.shape[2] - 0.5, int(pages.steps[-1]), 0),
        )  # fmt: skip
        axes.axvline(report["tokens"]["prompt"] / report["plan"]["page_size"] - 0.5,
                     color=COLORS["delta"], linestyle=":")  # fmt: skip
        axes.set(
            title=f"Attention to each page, layer {layer}", xlabel="page", ylabel="decode step"
        )
    figure.colorbar(image, ax=axes, label="share of attention")


def _entropy(figure: Figure, report: dict[str, Any], pages: PageMap) -> None:
    del pages
    axes = figure.subplots()
    image = axes.imshow(_array(report["entropy_bits"]).T, cmap="Blues", aspect="auto")
    _ticks(axes.set_xticks, report["layers"])
    _ticks(axes.set_yticks, list(range(len(report["entropy_bits"][0]))))
    axes.set(xlabel="layer", ylabel="head", title="Entropy of each head's attention, in bits")
    figure.colorbar(image, ax=axes)


def _sinks(figure: Figure, report: dict[str, Any], pages: PageMap) -> None:
    del pages
    (heads, hidden), (first, worth) = figure.subplots(2, 2)
    sinks = report["sinks"]
    top = _array([layer["top_mean"] for layer in sinks["layers"]])
    image = heads.imshow(top.T, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    _ticks(heads.set_xticks, report["layers"])
    _ticks(heads.set_yticks, list(range(top.shape[1])))
    heads.set(xlabel="layer", ylabel="head",
              title=f"Most attention to one token; {sinks['rate']:.1%} of heads above "
              f"{sinks['epsilon']:g}")  # fmt: skip
    figure.colorbar(image, ax=heads)
    layers = [layer["layer"] for layer in sinks["hidden"]]
    for key, label in (
        ("norm_ratio", "norm of the largest token"),
        ("first_norm_ratio", "norm of the first token"),
        ("peak_ratio", "largest entry"),
    ):
        hidden.plot(layers, [layer[key] for layer in sinks["hidden"]], label=label)
    hidden.set(xlabel="layer", ylabel="÷ median", yscale="log", title="Massive activations")
    hidden.legend()
    _first_page(first, report)
    losses = report["losses"]
    rows = [*losses["sink_pages"], *losses["removal"][1:]][::-1]
    worth.barh(
        [row["name"].replace(", ", ",\n").replace(" (", "\n(") for row in rows],
        [row["kl"] for row in rows],
        color=[COLORS["sparse" if row["name"].startswith("DELTA") else "dense"] for row in rows],
    )  # fmt: skip
    worth.set(xlabel="KL, nats a token", title="What the sink pages are worth")


def _first_page(axes: Any, report: dict[str, Any]) -> None:
    rows, deltas = report["first_page"], report["plan"]["delta_layers"]
    axes.bar([row["layer"] for row in rows], [row["mass"] for row in rows],
             color=[COLORS[role] for role in report["plan"]["roles"]])  # fmt: skip
    missed = {row["layer"]: row["missed"] for row in rows if row["layer"] in deltas}
    axes.plot(missed.keys(), missed.values(), linestyle="", marker="D", color="black",
              fillstyle="none", label="steps in which a Δ-layer's scores miss it")  # fmt: skip
    axes.set(xlabel="layer", ylabel="share", ylim=(0, 1.05), title="Attention to the first page")
    axes.legend()


_PAINTERS: tuple[tuple[tuple[float, float], Callable[..., None]], ...] = (
    ((9, 4), _shift),
    ((9, 4), _recall),
    ((13, 5.5), _matrices),
    ((13, 4), _drift),
    ((13, 5), _map),
    ((9, 3.5), _entropy),
    ((13, 9), _sinks),
)  # in the order of FIGURE_FILES


def _array(values: Any) -> Any:
    return np.array(values, dtype=float)  # None, which JSON has for NaN, becomes NaN


def _ticks(put: Callable[..., Any], layers: list[int]) -> None:
    every = -(-len(layers) // 16)
    put(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
