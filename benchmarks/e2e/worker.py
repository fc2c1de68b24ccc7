"""The process of one engine: ``python -m benchmarks.e2e.worker``."""

from __future__ import annotations

from typing import Any

from benchmarks.processes import Worker, serve_process


def _start(spec: dict[str, Any]) -> Worker:
    # Imported once stdout is out of its reach.
    from benchmarks.e2e.engine import Engine

    return Engine(spec)


if __name__ == "__main__":
    serve_process(_start)
