"""vLLM on the CPU, in float32, an engine a process: ``python -m benchmarks.lossless.in_vllm``."""

import sys
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

import deltadecode_vllm
from benchmarks.e2e.engine import set_environment
from benchmarks.e2e.workloads import own_drafts
from benchmarks.lossless.asked import Asked, Case
from benchmarks.lossless.run import make_plan
from benchmarks.processes import Process, serve_process
from deltadecode.engines.serving.settings import KEY
from deltadecode.engines.vllm import BACKEND


class InVllm:
    """Engines of at most ``batch`` rows, which join and leave as texts end."""

    def __init__(self, asked: Asked, batch: int) -> None:
        self._asked = asked
        self._spec = {
            "model": asked.folder, "dtype": "float32", "max_num_seqs": batch,
            "max_model_len": max(asked.contexts) + asked.tokens, "enforce_eager": True, "seed": 0,
            # Prompts come in parts then, beside rows that decode.
            "max_num_batched_tokens": 256, "enable_prefix_caching": True,
        }  # fmt: skip
        self._engines: dict[tuple[int, int] | None, Process] = {}
        self.peer = "vLLM"

    def generate(
        self, prompts: Sequence[Tensor], case: Case | None
    ) -> tuple[Tensor, dict[str, int]]:
        """New tokens of prompts, with full attention or in lossless mode."""
        plan = case and case[1:]
        if plan not in self._engines:
            self._engines[plan] = self._start(plan)
        found = self._engines[plan].do(
            {"prompts": [prompt.tolist() for prompt in prompts], "tokens": self._asked.tokens}
        )
        return torch.tensor(found["tokens"]), found["counts"]

    def _start(self, plan: tuple[int, int] | None) -> Process:
        spec: dict[str, Any] = {**self._spec}
        if plan is not None:
            cfg = make_plan(
                AutoConfig.from_pretrained(self._asked.folder), self._asked.page_size, plan[0]
            )
            spec |= {
                "attention_backend": BACKEND,
                # Batches draft whatever it costs.
                "additional_config": {KEY: {**cfg.to_dict(), "min_tokens": 0}},
                "speculative_config": own_drafts(plan[1], None),
            }
        command = [sys.executable, "-m", "benchmarks.lossless.in_vllm"]
        engine = Process("vLLM" if plan is None else "lossless", spec, command)
        self.peer = f"vLLM {engine.ready()['vllm']}"
        return engine

    def close(self) -> None:
        """End all engines."""
        for engine in self._engines.values():
            engine.stop()


class Engine:
    """A vLLM engine in this process; ``spec`` are its arguments."""

    def __init__(self, spec: dict[str, Any]) -> None:
        set_environment()
        deltadecode_vllm.register()
        from vllm import LLM

        self._llm = LLM(**spec, disable_log_stats=False)
        scheduler = self._llm.llm_engine.engine_core.engine_core.scheduler
        self._counts = dict.fromkeys(("drafted", "verified", "accepted", "attended", "full"), 0)
        counted = scheduler.make_spec_decoding_stats

        def count(*args: Any, **kwargs: Any) -> Any:
            given = signature(counted).bind(*args, **kwargs).arguments
            drafted, accepted = given["num_draft_tokens"], given["num_accepted_tokens"]
            new = {"drafted": drafted, "verified": min(drafted, accepted + 1), "accepted": accepted}
            for name, number in new.items():
                self._counts[name] += number
            return counted(*args, **kwargs)

        scheduler.make_spec_decoding_stats = count

    def facts(self) -> dict[str, Any]:
        """The version of vLLM."""
        import vllm

        return {"vllm": vllm.__version__}

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Write ``tokens`` new tokens of each of ``prompts``."""
        from vllm import SamplingParams

        before = dict(self._counts)
        sampling = SamplingParams(temperature=0.0, max_tokens=command["tokens"], ignore_eos=True)
        prompts = [{"prompt_token_ids": ids} for ids in command["prompts"]]
        outputs = self._llm.generate(prompts, sampling, use_tqdm=False)
        for name in ("attended", "full"):
            self._counts[name] = _counted(f"deltadecode_{name}_tokens")
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "counts": {name: self._counts[name] - before[name] for name in before},
        }


def _counted(name: str) -> int:
    from prometheus_client import REGISTRY

    found = (metric.samples for metric in REGISTRY.collect() if metric.name == name)
    return int(sum(samples[0].value for samples in found))


if __name__ == "__main__":
    serve_process(Engine)
