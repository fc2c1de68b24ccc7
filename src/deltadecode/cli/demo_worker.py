"""One side of the demo, in a process of its own; talks JSON lines with ``demo_workers``.

Reads its task from the command line, loads the model, says ``ready`` and waits for a line on stdin;
decodes, says ``tokens`` and ``tail`` as it goes, and ``done`` at the end. If its task says so, it
then prepares a larger model, waits for another line, times its steps, and says ``pairs`` and
``step``.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from deltadecode.cli.output import one_line, quiet_libraries

_BETWEEN_REPORTS = 0.2
_TAIL = 200


def main() -> None:
    """Do the task of the command line; its ``kind`` is ``problem`` or ``text``."""
    task = json.loads(sys.argv[1])
    try:
        if task["kind"] == "text":
            _say(done=_read(task["model"], task["delta"]))
            return
        _say(done=_decode(task["model"], task["delta"], task["seed"], task["steps"]))
        if task["larger"] is not None:
            _say(step=_time_step(**task["larger"]))
    except Exception as error:
        _say(error=f"{type(error).__name__}: {one_line(error)}")
        sys.exit(1)


def _decode(model: str, delta: bool, seed: int, steps: int | None) -> dict[str, Any]:
    quiet_libraries()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deltadecode.architecture import attention_layers
    from deltadecode.cli.decoding import decode
    from deltadecode.config import DeltaConfig
    from deltadecode.lab.tasks import extract_answer, is_correct, make_problem

    # The operations of a model this small do not fill a second core.
    torch.set_num_threads(1)
    problem = make_problem(seed) if steps is None else make_problem(seed, steps=steps)
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompt = tokenizer(problem.prompt, return_tensors="pt").input_ids
    expected_tokens = len(tokenizer(problem.solution).input_ids)
    _say(ready=expected_tokens)
    sys.stdin.readline()

    reports = _Reports()
    decoded = decode(
        loaded,
        tokenizer,
        prompt,
        DeltaConfig.for_model(loaded) if delta else None,
        # Room to end the text, and to go wrong a little.
        settings={"max_new_tokens": expected_tokens + 32, "do_sample": False},
        on_token=reports.on_token,
        on_text=reports.on_text,
    )
    new, length = len(decoded.token_ids), prompt.shape[1]
    # Decode step i reads the prompt and i new tokens; the first token comes from the prefill.
    read = len(attention_layers(loaded)) * sum(length + i for i in range(1, new))
    return {
        "answer": extract_answer(decoded.text),
        "correct": is_correct(problem, decoded.text),
        "expected": problem.answer,
        "prompt_tokens": length,
        "tokens": new,
        "seconds": decoded.seconds,
        "attended_tokens": decoded.attended_tokens if delta else read,
        "full_tokens": decoded.full_tokens if delta else read,
    }


def _read(model: str, delta: bool) -> dict[str, Any]:
    quiet_libraries()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deltadecode.cli.demo_text import solve
    from deltadecode.config import DeltaConfig

    # One thread a side, as for the problem.
    torch.set_num_threads(1)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    reports = _Reports()

    def on_ready(steps: int) -> None:
        _say(ready=steps)
        sys.stdin.readline()

    return solve(
        loaded,
        AutoTokenizer.from_pretrained(model),
        DeltaConfig.for_model(loaded) if delta else None,
        on_ready=on_ready,
        on_token=reports.on_token,
        on_text=reports.on_text,
    )


def _time_step(context: int, shape: dict[str, Any] | None, pairs: int) -> dict[str, Any]:
    """Time decode steps of a random model; None: of the shape of Qwen2.5-0.5B."""
    import torch
    from transformers import Qwen2Config

    from deltadecode.lab.collect_env import cores
    from deltadecode.lab.steptime import PLAN, StepTimer, qwen2_05b

    def on_ready() -> None:
        # Until here the other side may still be decoding on its one thread, as this one did.
        sys.stdin.readline()
        torch.set_num_threads(cores())

    config = qwen2_05b() if shape is None else Qwen2Config.from_dict(shape)
    pair = iter(range(1, pairs + 1))
    timed = StepTimer(config, torch.bfloat16).measure(
        context,
        PLAN,
        steps=pairs - 1,
        warmup=1,
        on_ready=on_ready,
        on_step=lambda: _say(pairs=next(pair)),
    )
    return {
        "step_ms_full": timed.full_ms,
        "step_ms_delta": timed.delta_ms,
        "step_speedup": timed.ratio,
        "step_context": context,
        "threads": torch.get_num_threads(),
    }


class _Reports:
    """Progress, a few times a second."""

    def __init__(self) -> None:
        self._tail = ""
        self._next = 0.0

    def on_text(self, text: str) -> None:
        self._tail = (self._tail + text)[-_TAIL:]

    def on_token(self, tokens: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _BETWEEN_REPORTS
            _say(tokens=tokens, tail=self._tail)


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
