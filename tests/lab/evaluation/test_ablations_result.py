"""The table of ablations on a real model in docs/accuracy.md is that of its result file."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
NAME = "eval-20261128-smollm2-ablations.json"


def test_the_table_is_that_of_the_file():
    result = json.loads((ROOT / "benchmarks" / "results" / NAME).read_text(encoding="utf-8"))
    found = {
        (row["policy"], row["budget"], re.search(r"stdlib-(\w+)", row["case"])[1]): row["kl"]
        for row in result["rows"]
    }
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    section = page.split("### What else was tried")[1].split("\n## ")[0]
    assert NAME in section
    rows = [line.split("|")[2:5] for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 15
    for policy, *cells in rows:
        for text, cell in zip(("docs", "code"), cells, strict=True):
            values = [found.get((policy.strip(" `"), budget, text)) for budget in (384, 768)]
            shown = " · ".join("–" if kl is None else f"{kl:.4f}" for kl in values)
            assert cell.strip() == shown, policy
