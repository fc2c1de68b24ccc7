"""The table of model types in docs/transformers.md: run with ``--write [types]`` to renew it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

PAGE = Path(__file__).parents[3] / "docs" / "transformers.md"
BEGIN, END = "<!-- model types: made by hf_table.py -->", "<!-- end of model types -->"
# They write no text without an image, or need more than small numbers to become tiny.
_LEFT_OUT = frozenset(
    [
        *("blip-2", "chameleon", "cosmos3_edge", "deepseek_ocr2", "diffusion_gemma"),
        *("ernie4_5_vl_moe", "evolla", "fast_vlm", "florence2", "glm5_next"),
        *("granite4_vision", "granite_docling", "hunyuan_vl", "idefics", "inkling2"),
        *("instructblip", "instructblipvideo", "janus", "kosmos-2", "molmo2"),
        *("muse_spark", "nemotron_h_omni", "perception_lm", "pi0", "qwen2_5_omni_thinker"),
        *("qwen3_omni_moe_thinker",),
    ]
)
TYPES = tuple(
    dict.fromkeys(
        [
            *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            *(name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in _LEFT_OUT),
        ]
    )
)


def render(outcomes: Mapping[str, str]) -> str:
    """The text between the markers: one row for each thing that happens."""
    by_outcome: dict[str, list[str]] = {}
    for model_type in sorted(outcomes):
        by_outcome.setdefault(outcomes[model_type], []).append(model_type)
    rows = sorted(by_outcome.items(), key=lambda row: (row[0] != "runs", -len(row[1]), row[0]))
    lines = [
        f"Transformers {transformers.__version__}, {len(outcomes)} types of model:",
        "",
        "| what happens | model types |",
        "|---|---|",
        *(
            f"| {what} ({len(types)}) | {', '.join(f'`{name}`' for name in types)} |"
            for what, types in rows
        ),
    ]
    return "\n".join(lines)


def read() -> tuple[str, dict[str, str]]:
    """Version of Transformers, and what happens by model type, as the page has them."""
    text = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    version = re.search(r"Transformers ([\w.]+),", text)
    assert version is not None
    outcomes = {}
    for what, types in re.findall(r"^\| (.+) \(\d+\) \| (`.+`) \|$", text, re.MULTILINE):
        outcomes.update(dict.fromkeys(re.findall(r"`([^`]+)`", types), what))
    return version[1], outcomes


def write(outcomes: Mapping[str, str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    page = f"{before}{BEGIN}\n{render(outcomes)}\n{END}{rest.split(END)[1]}"
    PAGE.write_text(page, encoding="utf-8")


def _outcome(model_type: str) -> str:
    from hf_sweep import outcome

    return outcome(model_type)


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    types = tuple(name for name in sys.argv[1:] if name != "--write") or TYPES
    with ProcessPoolExecutor(max_workers=2) as pool:
        outcomes = dict(zip(types, pool.map(_outcome, types), strict=True))
    if types != TYPES:
        outcomes = {**read()[1], **outcomes}
    if "--write" in sys.argv[1:]:
        write(outcomes)
    else:
        print(render(outcomes))


if __name__ == "__main__":
    main()
