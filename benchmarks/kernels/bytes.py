"""Bytes that each kernel moves through device memory, counted and measured.

``python -m benchmarks.kernels.bytes --out benchmarks/results`` runs every kernel once
under Nsight Compute (``ncu``), at batch 64 and 8,192 tokens, and sets its counters beside what the
kernel has to move.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.cases import CFG, DIM, Shape, moved_bytes, parse_heads
from benchmarks.kernels.inputs import SCALE, make_inputs
from deltadecode import ops
from deltadecode.lab.results import result, row, write_result

_METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
_BATCH, _CONTEXT = 64, 8192


def expected_bytes(shape: Shape) -> list[tuple[str, str, int]]:
    """What each launch has to move, in the order in which :func:`launch_each` makes them.

    Parameters
    ----------
    shape : Shape
        The shape.

    Returns
    -------
    list of tuple
        (operation, kernel, bytes), queries, outputs and tables left out.
    """
    logits = shape.batch * shape.context * shape.heads * 4
    scores = shape.batch * shape.pages * 4
    dense, sparse = moved_bytes("dense", shape), moved_bytes("sparse", shape)
    return [
        ("dense", "attend", dense),
        ("Δ", "attend", dense + logits),
        ("Δ", "finish", logits + scores),
        ("Δ", "select", scores),
        ("sparse", "attend", sparse),
    ]


def launch_each(shape: Shape) -> None:
    """Launch every kernel once, on cold caches.

    Parameters
    ----------
    shape : Shape
        The shape.
    """
    device = torch.device("cuda")
    inputs = make_inputs(shape, device, 0)
    keys, values = inputs.caches[0]
    arguments = (inputs.q, keys, values, inputs.block_table, inputs.seq_lens)
    options: dict[str, Any] = {"scale": SCALE, "page_size": CFG.page_size, "backend": "triton"}
    flush = torch.empty(2**28, dtype=torch.uint8, device=device)
    ops.decode_attention(*arguments, **options)
    flush.zero_()
    _, scores = ops.decode_attention(*arguments, **options, return_page_scores=True)
    flush.zero_()
    ids, counts = ops.select_pages(scores, inputs.seq_lens, CFG, backend="triton")
    flush.zero_()
    ops.decode_attention(*arguments, **options, page_ids=ids, page_counts=counts)
    torch.cuda.synchronize()


def read_counters(text: str) -> list[dict[str, Any]]:
    """Read what ``ncu --csv --print-units base`` prints.

    Parameters
    ----------
    text : str
        Its output; lines that are no part of the table may stand before it.

    Returns
    -------
    list of dict
        Per launch, in order: ``kernel``, and each metric by its name.
    """
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    launches: dict[str, dict[str, Any]] = {}
    for entry in csv.DictReader(lines[start:]):
        launch = launches.setdefault(entry["ID"], {"kernel": entry["Kernel Name"].split("(")[0]})
        launch[entry["Metric Name"]] = float(entry["Metric Value"].replace(",", ""))
    return list(launches.values())


def make_rows(shape: Shape, launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Set counters beside what was expected.

    Parameters
    ----------
    shape : Shape
        The shape.
    launches : list of dict
        See :func:`read_counters`; the merge of splits, which moves next to nothing, is left out.

    Returns
    -------
    list of dict
        Rows of a result: ours is measured, theirs is what the kernel has to move.
    """
    rows = []
    left = iter(launches)
    for operation, kernel, least in expected_bytes(shape):
        found = next(launch for launch in left if launch["kernel"] == kernel)
        read, written, nanoseconds = (found[name] for name in _METRICS)
        rows.append(
            row(
                f"{operation}: {kernel}, {shape.label}", "bytes it has to move", "MB",
                (read + written) / 1e6, least / 1e6, read_mb=round(read / 1e6, 3),
                written_mb=round(written / 1e6, 3), us_under_ncu=round(nanoseconds / 1e3, 2),
            )
        )  # fmt: skip
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Bytes each kernel moves, by hardware counters.")
    parser.add_argument("--heads", default="12/2", help="Hq/Hkv")
    parser.add_argument("--out", type=Path, help="folder to write the result to")
    parser.add_argument("--launch", action="store_true", help="only launch, as ncu needs it")
    given = parser.parse_args()
    try:
        shape = Shape(*parse_heads(given.heads), batch=_BATCH, context=_CONTEXT)
    except ValueError as error:
        parser.error(str(error))
    if given.launch:
        launch_each(shape)
        return
    if not torch.cuda.is_available() or shutil.which("ncu") is None:
        sys.exit(f"{parser.prog}: error: it needs a CUDA GPU and Nsight Compute's ncu")
    launch = ["-m", __spec__.name, "--launch", "--heads", given.heads]
    # Clocks are left as they are: bytes do not hang on them.
    profile = ["ncu", "--clock-control", "none", "--csv", "--print-units", "base"]
    profile += ["--metrics", ",".join(_METRICS), "--kernel-name", "regex:^(attend|finish|select)$"]
    done = subprocess.run([*profile, sys.executable, *launch], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{parser.prog}: error: ncu failed: {(done.stdout + done.stderr)[-500:]}")
    command = f"python -m benchmarks.kernels.bytes --heads {given.heads}"
    found = result("kernels", command, make_rows(shape, read_counters(done.stdout)))
    found["head_dim"] = DIM
    if given.out:
        write_result(found, given.out, f"bytes-{given.heads.replace('/', '-')}")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
