"""What the servers are asked for: requests, their lengths, and how fast they arrive."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.e2e.workloads import BLOCK


@dataclass(frozen=True)
class Workload:
    """Requests of one kind. Lengths are in tokens."""

    name: str
    prompt: int  # of each request, without the prefix
    output: int  # of each request
    requests: int  # in all
    concurrency: int  # at most, at once
    prefix: int = 0  # that all requests begin with

    @property
    def longest(self) -> int:
        """Tokens of a request at its end."""
        return self.prefix + self.prompt + self.output

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache has to hold at once, with a block's rest for each request."""
        return self.prefix + self.concurrency * (self.prompt + self.output + BLOCK)

    @property
    def case(self) -> str:
        """Its lengths, as a table names it."""
        prefix = f"{self.prefix:,} shared + " if self.prefix else ""
        return f"{self.name}: {prefix}{self.prompt:,} in, {self.output:,} out"


@dataclass(frozen=True)
class Rate:
    """Requests a second, or the part of what stock vLLM served when all came at once."""

    value: float
    of_stock: bool = False
    workload: str | None = None  # the only one that it is for

    def __str__(self) -> str:
        return "inf" if math.isinf(self.value) else f"{self.value:g}{'x' if self.of_stock else ''}"

    @property
    def saturates(self) -> bool:
        """Whether all requests are there from the start."""
        return math.isinf(self.value)


_WORKLOADS = (
    Workload("reasoning", prompt=512, output=8192, requests=128, concurrency=128),
    Workload("long-context", prompt=32768, output=1024, requests=24, concurrency=8),
    Workload("chat", prompt=1024, output=256, requests=512, concurrency=256),
    Workload("shared-prefix", prompt=512, output=512, requests=128, concurrency=64, prefix=16384),
)
WORKLOADS = {workload.name: workload for workload in _WORKLOADS}
DEFAULT_RATES = ("inf", "0.5x", "0.8x")


def find_workloads(
    names: Sequence[str],
    *,
    requests: int | None = None,
    concurrency: int | None = None,
    input_len: int | None = None,
    output_len: int | None = None,
    prefix_len: int | None = None,
) -> list[Workload]:
    """Workloads of these names, by default all; given numbers replace their own.

    A ValueError for an unknown name.
    """
    for name in names:
        if name not in WORKLOADS:
            raise ValueError(f"workload must be one of {', '.join(WORKLOADS)}, got {name!r}")
    given: dict[str, Any] = {
        "requests": requests,
        "concurrency": concurrency,
        "prompt": input_len,
        "output": output_len,
    }
    numbers = {name: value for name, value in given.items() if value is not None}
    chosen = [replace(WORKLOADS[name], **numbers) for name in dict.fromkeys(names or WORKLOADS)]
    if prefix_len is not None:
        chosen = [replace(one, prefix=prefix_len) if one.prefix else one for one in chosen]
    return chosen


def parse_rates(texts: Sequence[str]) -> list[Rate]:
    """Read ``inf``, ``4``, ``0.5x`` and ``chat=2``, in the order in which they run.

    A ValueError for anything else.
    """
    rates = list(dict.fromkeys(map(_parse_rate, texts or DEFAULT_RATES)))
    if any(rate.of_stock for rate in rates) and not any(rate.saturates for rate in rates):
        raise ValueError(f"a rate such as 0.5x needs inf beside it, got {', '.join(texts)}")
    return sorted(rates, key=lambda rate: not rate.saturates)


def _parse_rate(text: str) -> Rate:
    name, equals, rest = text.partition("=")
    if equals and name not in WORKLOADS:
        raise ValueError(f"a rate may begin with {'=, '.join(WORKLOADS)}=, got {text!r}")
    given = rest if equals else text
    number = given.removesuffix("x")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    of_stock = number != given
    if not value > 0 or (of_stock and math.isinf(value)):
        raise ValueError(f"a rate must be inf, requests a second or such as 0.5x, got {text!r}")
    return Rate(value, of_stock, name if equals else None)


def seed(workload: Workload, rate: Rate, number: int = 1) -> int:
    """Seed of a run's prompts: the same for both servers, another for each run and its number.

    With the prompts of an earlier run, a server would find them in its prefix cache.
    """
    again = f" {number}" if number > 1 else ""
    return zlib.crc32(f"{workload.name} {rate}{again}".encode()) % 2**16
