"""Take the pictures of docs/inspection.md from a report of ``deltadecode inspect``.

Usage: python docs/images/take.py REPORT_FOLDER. Needs playwright and a Chromium, as
``make test-browser`` does.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
LAYER = 15  # of the page map: a Δ-layer in the middle of SmolLM2
FIGURES = ("shift", "recall", "layers", "drift", "entropy", "sinks")


def take(report: Path) -> None:
    """Screenshots of the page, light and dark, and the report's figures.

    Parameters
    ----------
    report : Path
        Folder of the report.
    """
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme, name in (("light", "inspect.png"), ("dark", "inspect-map.png")):
            page = browser.new_page(
                viewport={"width": 1240, "height": 900},
                color_scheme=scheme,  # type: ignore[arg-type]
            )
            page.goto((report / "index.html").resolve().as_uri())
            page.wait_for_selector("body[data-ready=yes]")
            slider = page.locator("#map-slider")
            slider.press("Home")
            for _ in range(LAYER):
                slider.press("ArrowRight")
            slider.blur()
            page.evaluate("window.scrollTo(0, 0)")
            page.wait_for_timeout(500)
            if name == "inspect.png":
                end = page.locator("#section-pages .two").bounding_box()
                assert end is not None
                height = end["y"] + end["height"] + 14
                clip = {"x": 0, "y": 0, "width": 1240, "height": height}
                page.screenshot(path=HERE / name, full_page=True, clip=clip)  # type: ignore[arg-type]
            else:
                page.locator("#section-map").screenshot(path=HERE / name)
        browser.close()
    for figure in FIGURES:
        shutil.copyfile(report / f"{figure}.png", HERE / f"inspect-{figure}.png")


if __name__ == "__main__":
    take(Path(sys.argv[1]))
