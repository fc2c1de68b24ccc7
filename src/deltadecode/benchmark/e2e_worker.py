"""One side of the end-to-end benchmark, in a process of its own.

``python -m deltadecode.benchmark.e2e_worker TASK REPORT``: what to do is a JSON object; what was
found is appended to a file, one JSON object a line, as soon as it is known.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from deltadecode.benchmark.e2e_trace import summarize

# Tokens of context that one point of the curve of a long decode stands for.
_BUCKET = 1024
_PROFILED_STEPS = 12
_SETTLE = 4


class Engine:
    """vLLM's own engine loop, timed step by step.

    Parameters
    ----------
    task : dict
        See :func:`deltadecode.benchmark.e2e.make_task`.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        from vllm import LLM

        self.task = task
        self.engine = LLM(**task["engine"]).llm_engine
        self.vocabulary = self.engine.vllm_config.model_config.get_vocab_size()
        self.random = random.Random(0)
        self.sent = 0

    def send(self, batch: int, prompt: int, new: int) -> list[str]:
        """Queue random prompts.

        Parameters
        ----------
        batch, prompt, new : int
            Sequences, tokens of each prompt, and tokens to decode after it.

        Returns
        -------
        list of str
            Their names.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        names = []
        for _ in range(batch):
            self.sent += 1
            names.append(str(self.sent))
            tokens = [self.random.randrange(10, self.vocabulary) for _ in range(prompt)]
            self.engine.add_request(
                names[-1],
                {"prompt_token_ids": tokens},
                SamplingParams(
                    max_tokens=new,
                    ignore_eos=True,
                    temperature=0.0,
                    detokenize=False,
                    output_kind=RequestOutputKind.DELTA,
                ),
            )
        return names

    def step(self) -> list[str]:
        """Run the engine once.

        Returns
        -------
        list of str
            The sequences that got a token.
        """
        return [out.request_id for out in self.engine.step() if out.outputs[0].token_ids]

    def finish(self) -> None:
        """Run until nothing is left."""
        while self.engine.has_unfinished_requests():
            self.step()

    def prefill(self, names: list[str]) -> float:
        """Run until every sequence has its first token.

        Parameters
        ----------
        names : list of str
            The sequences.

        Returns
        -------
        float
            Seconds.
        """
        start = time.perf_counter()
        waiting = set(names)
        while waiting:
            waiting.difference_update(self.step())
        return time.perf_counter() - start

    def stop(self, names: list[str]) -> None:
        """Abort sequences.

        Parameters
        ----------
        names : list of str
            The sequences.
        """
        self.engine.abort_request(names)
        self.finish()

    def measure_steps(self, batch: int, context: int, steps: int) -> dict[str, Any]:
        """Time of a prefill and of the decode steps after it.

        Parameters
        ----------
        batch, context, steps : int
            Sequences, tokens of each prompt, and steps to take the median of.

        Returns
        -------
        dict
            ``prefill_s``, ``step_ms`` and its quartiles.

        Raises
        ------
        RuntimeError
            When the cache does not hold the batch.
        """
        names = self.send(batch, context, self.task["room"])
        prefill = self.prefill(names)
        for _ in range(_SETTLE):
            self.step()
        times = []
        last = time.perf_counter()
        for _ in range(steps):
            full = len(self.step()) == batch
            now = time.perf_counter()
            if full:
                times.append((now - last) * 1e3)
            last = now
        self.stop(names)
        if len(times) < steps // 2:
            raise RuntimeError(f"the KV cache holds fewer than {batch} sequences of {context}")
        low, middle, high = statistics.quantiles(times, n=4)
        return {
            "kind": "step", "batch": batch, "context": context, "prefill_s": prefill,
            "step_ms": middle, "quartiles_ms": [low, high],
        }  # fmt: skip

    def measure_decode(self, batch: int, prompt: int, tokens: int) -> dict[str, Any]:
        """Time of decoding short prompts to full length.

        Parameters
        ----------
        batch, prompt, tokens : int
            Sequences, tokens of each prompt, and tokens of each sequence at the end.

        Returns
        -------
        dict
            ``total_s``, ``tokens_per_s``, and ``curve``: context and median ms of a step there.
        """
        start = last = time.perf_counter()
        self.send(batch, prompt, tokens - prompt)
        times: list[list[float]] = [[] for _ in range(-(-tokens // _BUCKET))]
        written = 0
        while self.engine.has_unfinished_requests():
            got = len(self.step())
            now = time.perf_counter()
            written += got
            if got == batch:
                times[min(prompt + written // batch, tokens - 1) // _BUCKET].append(now - last)
            last = now
        total = last - start
        curve = [
            [_BUCKET * place + _BUCKET // 2, statistics.median(found) * 1e3]
            for place, found in enumerate(times)
            if found
        ]
        return {
            "kind": "decode", "batch": batch, "prompt": prompt, "tokens": tokens,
            "total_s": total, "tokens_per_s": written / total, "curve": curve,
        }  # fmt: skip

    def profile(self, batch: int, context: int, folder: Path) -> dict[str, Any]:
        """Kernels of decode steps, by PyTorch's profiler inside vLLM.

        Parameters
        ----------
        batch, context : int
            Sequences and tokens of each prompt.
        folder : Path
            Where vLLM was told to write traces.

        Returns
        -------
        dict
            See :func:`deltadecode.benchmark.e2e_trace.summarize`.
        """
        names = self.send(batch, context, self.task["room"])
        self.prefill(names)
        for _ in range(_SETTLE):
            self.step()
        self.engine.start_profile()
        for _ in range(_PROFILED_STEPS):
            self.step()
        self.engine.stop_profile()
        self.stop(names)
        return {"kind": "profile", "batch": batch, "context": context, **summarize(folder)}


def main() -> None:
    """Run from the command line."""
    task = json.loads(sys.argv[1])
    report = Path(sys.argv[2])

    def tell(found: dict[str, Any]) -> None:
        with report.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")

    start = time.perf_counter()
    engine = Engine(task)
    tell({"kind": "start", "seconds": time.perf_counter() - start})
    for batch in sorted({part["batch"] for part in task["parts"]}):
        # What compiles at first use does so now, a mixed batch's kernels included.
        engine.send(max(1, batch - 1), 64, 24)
        for _ in range(4):
            engine.step()
        engine.send(1, 64, 8)
        engine.finish()
    for part in task["parts"]:
        if part["kind"] == "step":
            tell(engine.measure_steps(part["batch"], part["context"], part["steps"]))
        elif part["kind"] == "decode":
            tell(engine.measure_decode(part["batch"], part["prompt"], part["tokens"]))
        else:
            tell(engine.profile(part["batch"], part["context"], Path(task["traces"])))


if __name__ == "__main__":
    main()
