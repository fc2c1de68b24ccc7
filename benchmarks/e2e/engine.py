"""One vLLM engine, its steps driven and timed one by one: ``python -m benchmarks.e2e.engine``."""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import deltadecode_vllm
from benchmarks import multicast
from benchmarks.e2e.profile import summarize
from benchmarks.e2e.workloads import PACE_STEPS, drawn_acceptance, own_drafts
from benchmarks.processes import serve_process, write_entry_point
from benchmarks.watch import watch
from deltadecode.engines.serving.settings import KEY
from deltadecode.engines.vllm import BACKEND

_FIRST_TOKEN = 10  # past the special ones
_SEED = 0


class Engine:
    """A vLLM engine in this process, with random weights.

    ``spec`` has ``model`` (folder with a ``config.json``), ``batch``, ``longest`` (tokens of a
    sequence), ``ranks`` (tensor parallel), ``worker_process`` (whether even a single one has a
    process of its own), ``memory_share`` (of each device), ``kv_bytes`` (of the cache on each;
    None: what the share leaves), ``eager``, ``vocabulary``, ``drafts`` (made of each sequence in
    each step), ``lossless`` (whether DELTA makes them) and ``acceptance`` (of each, by
    drawing; None: by what the weights give), ``kv_cache_dtype``, and ``plan``: values of a
    DeltaConfig and perhaps ``sync_heads``, or None for stock attention.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        set_environment()
        if spec["plan"] is not None:
            # Registered here, since in a source tree there is no entry point for vLLM to find.
            deltadecode_vllm.register()
        ranks: dict[str, Any] = {}
        if spec["ranks"] > 1 or spec["worker_process"]:
            ranks = self._set_ranks(spec["ranks"])
        from vllm import LLM

        ours = {"attention_backend": BACKEND, "additional_config": {KEY: spec["plan"]}}
        began = time.perf_counter()
        self._llm = LLM(
            model=spec["model"], load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
            seed=_SEED, max_num_seqs=spec["batch"], max_model_len=spec["longest"],
            gpu_memory_utilization=spec["memory_share"], kv_cache_memory_bytes=spec["kv_bytes"],
            kv_cache_dtype=spec["kv_cache_dtype"],
            # With it, the second round of a prefill would read nothing.
            enable_prefix_caching=False,
            disable_log_stats=True, enforce_eager=spec["eager"],
            speculative_config=_drafting(spec) if spec["drafts"] else None,
            **(ours if spec["plan"] is not None else {}), **ranks,
        )  # fmt: skip
        if spec["drafts"] and not spec["lossless"]:
            _draft_always(spec["drafts"])
        self._engine = self._llm.llm_engine
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._vocabulary, self._drafts = spec["vocabulary"], spec["drafts"]
        self._ids: list[str] = []
        self._preemptions = self._verified = 0
        self._waited = 0.0
        self._time_waits()
        watch(self._scheduler, "_preempt_request", self._count_preemption)
        watch(self._scheduler, "schedule", self._count_drafts)
        # What compiles at its first use does so now.
        self._decode(min(spec["batch"], 4), 16, 8)
        self.start_s = time.perf_counter() - began

    def facts(self) -> dict[str, Any]:
        """What runs, for the result.

        ``kv_tokens`` is what the cache holds, ``backends`` those of the attention layers.
        """
        import vllm

        config = self._engine.vllm_config
        cache = config.cache_config
        tokens = getattr(cache, "kv_cache_size_tokens", None)
        return {
            "start_s": round(self.start_s, 1),
            "kv_tokens": tokens or cache.num_gpu_blocks * cache.block_size,
            "backends": self._llm.collective_rpc(_backends)[0],
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode).rpartition(".")[2],
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "executor": config.parallel_config.distributed_executor_backend,
            "model_runner": 2 if getattr(config, "use_v2_model_runner", False) else 1,
            "tensor_parallel": config.parallel_config.tensor_parallel_size,
            "drafting": getattr(config.speculative_config, "method", None),
            "vllm": vllm.__version__,
        }

    def _set_ranks(self, count: int) -> dict[str, Any]:
        """Arguments of an engine with ranks in processes of their own."""
        self._folder = tempfile.TemporaryDirectory(prefix="deltadecode-")
        # Processes that are not forked look for the plugin on this process's path.
        sys.path.insert(0, str(write_entry_point(Path(self._folder.name))))
        return {
            "tensor_parallel_size": count, "distributed_executor_backend": "mp",
            "compilation_config": multicast.COMPILATION,
        }  # fmt: skip

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command: ``do`` names it, the other keys are its arguments.

        Gives what was measured: ``seconds`` each of a number of steps or of the whole;
        ``preemptions`` meanwhile; and ``waited``, the seconds in which the engine had nothing to do
        but to wait for what a step gives: for the device, or for a worker in another process.
        Without asynchronous scheduling and such workers there are none.
        """
        arguments = {key: value for key, value in command.items() if key != "do"}
        name = "decode" if command["do"] in ("headline", "prefill") else command["do"]
        self._preemptions = 0
        self._waited = 0.0
        measured: dict[str, Any] = getattr(self, f"_{name}")(**arguments)
        return {**measured, "preemptions": self._preemptions, "waited": round(self._waited, 6)}

    def _decode(self, batch: int, prompt: int, new_tokens: int) -> dict[str, Any]:
        """Run whole sequences, from the first step to the last."""
        self._enqueue(batch, prompt, new_tokens)
        ends = [time.perf_counter()]
        while self._engine.has_unfinished_requests():
            self._engine.step()
            ends.append(time.perf_counter())
        self._ids = []
        return {"seconds": ends[-1] - ends[0], "steps": np.diff(ends).round(7).tolist()}

    def _fill(self, batch: int, prompt: int, new_tokens: int) -> dict[str, Any]:
        """Read prompts, until every sequence decodes."""
        self._enqueue(batch, prompt, new_tokens)
        began = time.perf_counter()
        while not self._all_decode(batch):
            self._engine.step()
        return {"seconds": time.perf_counter() - began}

    def _steps(self, steps: int) -> dict[str, Any]:
        """Time decode steps of the sequences that are in the cache.

        With asynchronous scheduling a call gives the GPU its next step and waits for the one
        before, so from one return to the next is one step all the same.
        """
        for _ in range(PACE_STEPS):
            self._engine.step()
        before, verified, self._waited = self._lengths(), self._verified, 0.0
        ends = [time.perf_counter()]
        for _ in range(steps):
            self._engine.step()
            ends.append(time.perf_counter())
        after, verified = self._lengths(), self._verified - verified
        # Each call must have been one step of every sequence, else these are no step times.
        most = steps * (1 + self._drafts)
        made = [n - m for n, m in zip(after, before, strict=True)]
        if len(before) != len(self._ids) or min(made) < steps or max(made) > most:
            raise RuntimeError(f"{steps} calls were not {steps} decode steps of every sequence")
        drafted: dict[str, Any] = {"verified": verified} if self._drafts else {}
        drafted["tokens"] = sum(made) / len(made) / steps
        return {"seconds": np.diff(ends).tolist(), "from": min(before), "to": max(after), **drafted}

    def _profile(self, steps: int) -> dict[str, Any]:
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            with profile(activities=activities) as recorded:
                for _ in range(steps):
                    self._engine.step()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            recorded.export_chrome_trace(str(trace))
            return summarize(trace, steps)

    def _drop(self) -> dict[str, Any]:
        # vLLM hands out its own names of requests, and takes the caller's unless told.
        self._engine.abort_request(self._ids, internal=True)
        self._ids = []
        # Steps that were under way when their sequences went away, with asynchronous scheduling.
        for _ in range(2):
            self._engine.step()
        if self._scheduler.requests:
            raise RuntimeError(f"{len(self._scheduler.requests)} sequences are still in the cache")
        return {}

    def _enqueue(self, batch: int, prompt: int, new_tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        random = np.random.default_rng(_SEED)
        tokens = random.integers(_FIRST_TOKEN, self._vocabulary, (batch, prompt)).tolist()
        sampling = SamplingParams(
            max_tokens=new_tokens, ignore_eos=True, temperature=0.0, detokenize=False,
            # As LLM.generate does; else every step would copy out all tokens so far.
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in tokens]
        self._ids = list(self._llm.enqueue(prompts, sampling, use_tqdm=False))

    def _lengths(self) -> list[int]:
        return [request.num_tokens for request in self._scheduler.requests.values()]

    def _all_decode(self, batch: int) -> bool:
        requests = self._scheduler.requests.values()
        if len(requests) < batch:
            raise RuntimeError("a sequence ended before all of them were in the cache")
        return all(request.num_output_tokens for request in requests)

    def _time_waits(self) -> None:
        from vllm.v1.executor.multiproc_executor import FutureWrapper
        from vllm.v1.executor.uniproc_executor import AsyncOutputFuture

        for future in (AsyncOutputFuture, FutureWrapper):
            self._time_wait(future)

    def _time_wait(self, future: Any) -> None:
        get = future.result

        def result(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return get(*arguments, **options)
            finally:
                self._waited += time.perf_counter() - began

        future.result = result

    def _count_preemption(self, _: Any) -> None:
        self._preemptions += 1

    def _count_drafts(self, output: Any) -> None:
        self._verified += sum(map(len, output.scheduled_spec_decode_tokens.values()))


def _backends(worker: Any) -> list[str]:
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    found = {layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")}
    return sorted(found)


def _drafting(spec: dict[str, Any]) -> dict[str, Any]:
    count, rate = spec["drafts"], spec["acceptance"]
    if not spec["lossless"]:
        from vllm.platforms import current_platform

        lookup = {"prompt_lookup_min": 1, "prompt_lookup_max": 2, **drawn_acceptance(count, rate)}
        # On the device: only then, as with drafting models, does vLLM schedule asynchronously.
        method = "ngram_gpu" if current_platform.is_cuda() else "ngram"
        return {"method": method, "num_speculative_tokens": count, **lookup}
    return own_drafts(count, rate)


def _draft_always(count: int) -> None:
    """Have every sequence drafted in every step: weights are random, and repeat nothing.

    What a step costs does not depend on how many drafts are accepted. With an acceptance vLLM
    draws how many, and from one seed on both sides.
    """
    # After the engine has started: on CPUs, vLLM 0.32 does not once numba is loaded.
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer
    from vllm.v1.spec_decode.ngram_proposer_gpu import NgramProposerGPU

    def propose(self: Any, *arguments: Any, **options: Any) -> list[list[int]]:
        sampled = next(each for each in (*arguments, *options.values()) if isinstance(each, list))
        return [[_FIRST_TOKEN] * count if tokens else [] for tokens in sampled]

    def propose_there(
        self: Any, number: int, lengths: Any, tokens: Any, sampled: Any, kept: Any
    ) -> tuple[Any, Any]:
        drafts = sampled.new_full((len(kept), number), _FIRST_TOKEN)
        return drafts, (kept > 0).to(kept.dtype) * number

    NgramProposer.propose, NgramProposerGPU.propose = propose, propose_there


def set_environment() -> None:
    """Have an engine run in this process, and quietly; before vLLM is imported."""
    # In one process, so that the plugin is registered where the
    # engine runs, its scheduler can be asked, and the profiler sees its kernels.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    serve_process(Engine)
