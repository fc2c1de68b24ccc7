"""One vLLM engine in this process, under random requests: ``python -m benchmarks.soak.engine``."""

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deltadecode_vllm
from benchmarks.processes import serve_process
from benchmarks.watch import watch
from deltadecode.engines.serving.settings import KEY
from deltadecode.engines.vllm import BACKEND

_QUIET = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
_ABORTED = 1 / 3  # of the requests
BLOCK = 32  # tokens of a block of the cache; a multiple of what each backend asks for
_DRAIN_STEPS = 100_000
_MEMORY_CHECKS, _MEMORY_CHECK_S = 30, 2.0


@dataclass
class Live:
    """A request that runs."""

    prompt: int  # its place among the prompts
    tokens: int  # that it may write
    abort_after: int | None  # tokens; None: it runs to its end


class Engine:
    """A vLLM engine with greedy requests.

    ``spec`` has ``model``, ``dtype``, ``concurrency``, ``longest`` (tokens of a sequence),
    ``blocks`` (of the KV cache; None: what fits), ``kv_bytes`` (of its memory; None: what the share
    leaves), ``eager``, ``seed``, and ``plan``: values of a DeltaConfig, or None for stock
    attention.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        # Read when vLLM is imported. In one process, so that its scheduler can be asked.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        if spec["plan"] is not None:
            # Registered here, since in a source tree there is no entry point for vLLM to find.
            deltadecode_vllm.register()
        _wait_for_memory()
        from vllm import LLM

        ours = {"attention_backend": BACKEND, "additional_config": {KEY: spec["plan"]}}
        self._engine = LLM(
            model=spec["model"], dtype=spec["dtype"], seed=0, max_num_seqs=spec["concurrency"],
            max_model_len=spec["longest"], block_size=BLOCK, num_gpu_blocks_override=spec["blocks"],
            gpu_memory_utilization=spec["memory_share"], kv_cache_memory_bytes=spec["kv_bytes"],
            enforce_eager=spec["eager"],
            **(ours if spec["plan"] is not None else {}),
        ).llm_engine  # fmt: skip
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._pool = self._scheduler.kv_cache_manager.block_pool
        self._free = self._pool.get_num_free_blocks()
        self._random = random.Random(spec["seed"])
        self._concurrency = spec["concurrency"]
        self._live: dict[str, Live] = {}
        self._count = 0
        self._preemptions = 0
        watch(self._scheduler, "_preempt_request", self._count_preemption)

    def facts(self) -> dict[str, Any]:
        """What runs, for the result."""
        import vllm

        return {"blocks": self._free, "vllm": vllm.__version__}

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command: ``do`` names it, the other keys are its arguments."""
        arguments = {key: value for key, value in command.items() if key != "do"}
        found: dict[str, Any] = getattr(self, f"_{command['do']}")(**arguments)
        return found

    def _reference(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Greedy tokens of each prompt, and by how much each won: nats before the second."""
        answers: dict[int, dict[str, Any]] = {}
        for place, prompt in enumerate(prompts):
            self._add(str(place), prompt, tokens, logprobs=2)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    answers[int(output.request_id)] = _answer(output.outputs[0])
        return {"answers": [answers[place] for place in range(len(prompts))]}

    def _prompts(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Keep the prompts of which requests are made, and the most tokens that one may write."""
        self._texts, self._most = prompts, tokens
        return {}

    def _run(self, requests: int) -> dict[str, Any]:
        """Start so many requests, as others end; those that live on are not waited for."""
        ended: list[dict[str, Any]] = []
        aborted = started = 0
        while started < requests:
            # Arrivals come in bursts, and leave places empty between them.
            room = self._concurrency - len(self._live)
            for _ in range(min(self._random.randint(0, 3), room, requests - started)):
                self._start()
                started += 1
            aborted += self._step(ended)
        return {**self._memory(), "started": started, "aborted": aborted, "ended": ended}

    def _drain(self) -> dict[str, Any]:
        """Let the rest end, and count the blocks that are free then."""
        ended: list[dict[str, Any]] = []
        aborted = 0
        for _ in range(_DRAIN_STEPS):
            if not self._engine.has_unfinished_requests():
                break
            aborted += self._step(ended)
        return {
            **self._memory(), "aborted": aborted, "ended": ended, "live": len(self._live),
            "held": len(self._scheduler.requests), "preemptions": self._preemptions,
            "free": self._pool.get_num_free_blocks(), "free_at_start": self._free,
        }  # fmt: skip

    def _start(self) -> None:
        tokens = self._random.randint(1, self._most)
        doomed = self._random.random() < _ABORTED
        live = Live(
            prompt=self._random.randrange(len(self._texts)),
            tokens=tokens,
            abort_after=self._random.randrange(tokens) if doomed else None,
        )
        name = f"soak-{self._count}"
        self._count += 1
        self._live[name] = live
        self._add(name, self._texts[live.prompt], tokens)

    def _step(self, ended: list[dict[str, Any]]) -> int:
        doomed = {name for name, live in self._live.items() if live.abort_after == 0}
        for output in self._engine.step():
            live = self._live[output.request_id]
            tokens = output.outputs[0].token_ids
            if output.finished:
                del self._live[output.request_id]
                doomed.discard(output.request_id)
                ended.append({"prompt": live.prompt, "asked": live.tokens, "tokens": list(tokens)})
            elif live.abort_after is not None and len(tokens) >= live.abort_after:
                doomed.add(output.request_id)
        if doomed:
            self._engine.abort_request(sorted(doomed))
            for name in doomed:
                del self._live[name]
        return len(doomed)

    def _add(self, name: str, prompt: list[int], tokens: int, logprobs: int | None = None) -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=tokens, temperature=0.0, detokenize=False, logprobs=logprobs
        )
        self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)

    def _count_preemption(self, _: Any) -> None:
        self._preemptions += 1

    def _memory(self) -> dict[str, Any]:
        import torch

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        found = {"rss_mib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)}
        if torch.cuda.is_available():
            found["gpu_mib"] = round(torch.cuda.memory_reserved() / 2**20, 1)
        return found


def _answer(output: Any) -> dict[str, Any]:
    margins = []
    for token, entries in zip(output.token_ids, output.logprobs, strict=True):
        best = entries[token].logprob
        others = [entry.logprob for other, entry in entries.items() if other != token]
        margins.append(round(best - max(others), 5))
    return {"tokens": list(output.token_ids), "margins": margins}


def _wait_for_memory() -> None:
    """Wait until the engine before this one has given all of its GPU's memory back.

    That goes on after its process has ended, and vLLM takes free memory that grows for an error.
    """
    import torch

    if not torch.cuda.is_available():
        return
    free = -1
    for _ in range(_MEMORY_CHECKS):
        before, free = free, int(torch.cuda.mem_get_info()[0])
        if free == before:
            return
        time.sleep(_MEMORY_CHECK_S)


if __name__ == "__main__":
    serve_process(Engine)
