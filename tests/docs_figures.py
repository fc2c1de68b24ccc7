"""Rows of result files, and numbers as pages write them."""

import json
from decimal import ROUND_HALF_UP, Decimal

from docs_pages import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def rows_of(file, **keys):
    """Rows of a result file in which these keys have these values."""
    rows = json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if all(row.get(key) == value for key, value in keys.items())]


def rounded(number, places):
    """As on paper: a half goes up."""
    return f"{Decimal(str(number)).quantize(Decimal(10) ** -places, ROUND_HALF_UP):,}"


def gain(row):
    """Theirs by ours, as pages write it."""
    return rounded(row["theirs"] / row["ours"], 2)


def compared(row, places, unit):
    """Theirs, ours and their ratio, as a table writes them."""
    both = [f"{rounded(row[side], places)} {unit}" for side in ("theirs", "ours")]
    return [*both, gain(row)]


def served(file, workload, what, places, unit):
    """What two servers did when all requests of a workload came at once."""
    (row,) = rows_of(file, workload=workload, rate="inf")
    stock, ours = row[f"{what}_theirs"], row[f"{what}_ours"]
    ratio = ours / stock if what == "tok_s" else stock / ours
    return [*(f"{rounded(side, places)} {unit}" for side in (stock, ours)), rounded(ratio, 2)]
