"""Bytes that each kernel moves through device memory, counted and measured.

``python -m benchmarks.kernels.bytes --out benchmarks/results`` runs every kernel once
under Nsight Compute (``ncu``), at batch 64 and 8,192 tokens, and sets its counters beside what the
kernel has to move.
"""

import csv
import shutil
import subprocess
import sys
from typing import Annotated, Any

import torch
import typer

from benchmarks.command import Json, Out, checking, command_line, deliver, launch
from benchmarks.kernels.cases import CFG, DIM, Shape, moved_bytes, parse_heads
from benchmarks.kernels.inputs import make_inputs, our_calls
from benchmarks.processes import environment
from benchmarks.report import table
from deltadecode import ops
from deltadecode.lab.results import result, row

_METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
_BATCH, _CONTEXT = 64, 8192


def expected_bytes(shape: Shape) -> list[tuple[str, str, int]]:
    """(operation, kernel, bytes) of each launch of :func:`launch_each`, in its order.

    Queries, outputs and tables are left out.
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
    """Launch every kernel once, on cold caches."""
    device = torch.device("cuda")
    inputs = make_inputs(shape, device, 0)
    calls = our_calls(inputs, "triton")
    flush = torch.empty(2**28, dtype=torch.uint8, device=device)
    calls["dense"][0]()
    flush.zero_()
    _, scores = calls["scores"][0]()
    flush.zero_()
    ops.select_pages(scores, inputs.seq_lens, CFG, backend="triton")
    flush.zero_()
    calls["sparse"][0]()
    torch.cuda.synchronize()


def read_counters(text: str) -> list[dict[str, Any]]:
    """Read what ``ncu --csv --print-units base`` prints, with any lines before the table.

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
    """Set counters (ours) beside what the kernel has to move (theirs).

    The merge of splits, which moves next to nothing, is left out.
    """
    rows = []
    left = iter(launches)
    for operation, kernel, least in expected_bytes(shape):
        counters = next(launch for launch in left if launch["kernel"] == kernel)
        read, written, nanoseconds = (counters[name] for name in _METRICS)
        rows.append(
            row(
                f"{operation}: {kernel}, {shape.label}", "bytes it has to move", "MB",
                (read + written) / 1e6, least / 1e6, read_mb=round(read / 1e6, 3),
                written_mb=round(written / 1e6, 3), us_under_ncu=round(nanoseconds / 1e3, 2),
            )
        )  # fmt: skip
    return rows


def kernel_bytes(
    heads: Annotated[str, typer.Option(help="Query heads/KV heads.")] = "12/2",
    only_launch: Annotated[bool, typer.Option("--launch", hidden=True)] = False,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Count the bytes that each kernel moves, by hardware counters (Nsight Compute's ncu)."""
    tag = f"bytes-{heads.replace('/', '-')}"
    with checking(out, tag):
        shape = Shape(*parse_heads(heads), batch=_BATCH, context=_CONTEXT)
    if only_launch:
        launch_each(shape)
        return
    if not torch.cuda.is_available() or shutil.which("ncu") is None:
        raise RuntimeError("it needs a CUDA GPU and Nsight Compute's ncu")
    again = [sys.executable, "-m", "benchmarks.kernels.bytes", "--launch", "--heads", heads]
    # Clocks are left as they are: bytes do not depend on them.
    profile = ["ncu", "--clock-control", "none", "--csv", "--print-units", "base"]
    profile += ["--metrics", ",".join(_METRICS), "--kernel-name", "regex:^(attend|finish|select)$"]
    done = subprocess.run([*profile, *again], capture_output=True, text=True, env=environment())
    if done.returncode:
        raise RuntimeError(f"ncu failed: {(done.stdout + done.stderr)[-500:]}")
    command = command_line("kernels.bytes", heads=heads)
    rows = make_rows(shape, read_counters(done.stdout))
    deliver({**result("kernels", command, rows), "head_dim": DIM}, out, tag, as_json, table)


if __name__ == "__main__":
    launch(kernel_bytes)
