"""The process of one engine: ``python -m benchmarks.e2e.worker``.

Reads JSON lines from stdin, first what to start and then commands, and answers each with one JSON
line on stdout. It ends at the end of its input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO


def serve(lines: TextIO, answers: TextIO, start: Callable[[dict[str, Any]], Any]) -> int:
    """Answer commands until the input ends or one fails.

    Parameters
    ----------
    lines : TextIO
        Where commands come from.
    answers : TextIO
        Where answers go to: ``{"ready": ...}``, ``{"done": ...}`` or ``{"error": "one line"}``.
    start : callable
        Makes the engine from the first line.

    Returns
    -------
    int
        Exit code: 1 after an error.
    """

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        engine = start(json.loads(lines.readline()))
        answer(ready=engine.facts())
        for line in lines:
            answer(done=engine.do(json.loads(line)))
    except BaseException as error:
        text = " ".join(str(error).split())
        answer(error=f"{type(error).__name__}: {text}" if text else type(error).__name__)
        raise
    return 0


def main() -> None:
    """Run as a process."""
    # Engines print to stdout; what the other side reads goes out by a file of its own.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        from benchmarks.e2e.engine import Engine

        sys.exit(serve(sys.stdin, answers, Engine))


if __name__ == "__main__":
    main()
