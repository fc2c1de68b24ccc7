"""Checks what was asked of the load benchmark."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import command_line
from benchmarks.e2e.measure import SIDES
from benchmarks.e2e.shapes import find_shape
from benchmarks.e2e.workloads import check_drafts
from benchmarks.serve.run import LoadOptions
from benchmarks.serve.workloads import find_workloads, parse_rates
from benchmarks.variables import parse_variables
from deltadecode.config import DeltaConfig

_TAKEN = ("--host", "--port", "--attention-backend", "--additional-config", "--served-model-name")

# Given whole, or by another name, it would take the place of what the benchmark gives.
_COMPILATION = "--compilation-config"


def make_options(
    *,
    shape: str = "r1-1.5b",
    names: Sequence[str] = (),
    rates: Sequence[str] = (),
    requests: int | None = None,
    concurrency: int | None = None,
    input_len: int | None = None,
    output_len: int | None = None,
    prefix_len: int | None = None,
    side: str | None = None,
    flags: Sequence[str] = (),
    variables: Sequence[str] = (),
    plan: Path | None = None,
    raw: Path = Path("build/load"),
    minutes: float | None = None,
    rounds: int = 1,
    start_together: bool = False,
    lossless: bool = False,
    drafts: int = 4,
    acceptance: float | None = None,
) -> LoadOptions:
    """Check what was asked for; a ValueError for what cannot be measured."""
    model = find_shape(shape)
    workloads = find_workloads(
        names, requests=requests, concurrency=concurrency, input_len=input_len,
        output_len=output_len, prefix_len=prefix_len,
    )  # fmt: skip
    for one in workloads:
        if one.longest > model.positions:
            raise ValueError(
                f"{one.name} has {one.longest} tokens, but {model.name} takes {model.positions}"
            )
    if side is not None and side not in SIDES:
        raise ValueError(f"--side must be {' or '.join(SIDES)}, got {side!r}")
    for flag in flags:
        if flag.partition("=")[0].replace("_", "-") in _TAKEN:
            raise ValueError(f"--server-flag must leave {flag.partition('=')[0]} to the benchmark")
        if flag.startswith("-cc") or flag.partition("=")[0].replace("_", "-") == _COMPILATION:
            raise ValueError(
                f"--server-flag must give one value, as in {_COMPILATION}.mode=0: the benchmark "
                f"gives others, got {flag.partition('=')[0]}"
            )
    if acceptance is not None and not lossless:
        raise ValueError(f"acceptance is for --lossless, got {acceptance} without")
    check_drafts(lossless, drafts, acceptance)
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {minutes:g}")
    if raw.exists() and not raw.is_dir():
        raise ValueError(f"--raw must be a folder, got {str(raw)!r}")
    cfg = model.plan if plan is None else DeltaConfig.load(plan)
    cfg.layer_plan(model.layers)
    command = command_line(
        "serve", shape=shape, workload=list(names), rate=list(rates), requests=requests,
        concurrency=concurrency, input_len=input_len, output_len=output_len,
        prefix_len=prefix_len, rounds=rounds if rounds > 1 else None,
        server_flag=[" ".join(flags)] if flags else [], plan=plan,
        start_together=start_together, lossless=lossless, drafts=drafts if lossless else None,
        acceptance=acceptance, env=list(variables),
    )  # fmt: skip
    return LoadOptions(
        shape=model, plan=cfg, workloads=workloads, rates=parse_rates(rates), raw=raw,
        flags=tuple(flags), variables=parse_variables(variables),
        sides=SIDES if side is None else (side,), minutes=minutes, rounds=rounds,
        start_together=start_together, command=command, drafts=drafts if lossless else 0,
        acceptance=acceptance,
    )  # fmt: skip
