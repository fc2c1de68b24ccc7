"""Peak memory of decoding, one side per process: ``python -m benchmarks.process_memory``."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import DynamicCache, Qwen2Config

from benchmarks.processes import environment
from deltadecode.config import DeltaConfig
from deltadecode.engines.transformers import DeltaCache, enable
from deltadecode.lab.steptime import decode_step, fill_cache, random_model

Side = Literal["full", "delta"]
_STEPS = 4


def peak_memory(
    side: Side, config: Qwen2Config, context: int, dtype: torch.dtype, cfg: DeltaConfig
) -> float:
    """MiB at most of a fresh process that decodes a few tokens of a random model.

    The high-water mark of its resident set: interpreter, weights, cache and all. A RuntimeError of
    one line when the process fails.
    """
    task = {
        "side": side, "config": config.to_dict(), "context": context,
        "dtype": str(dtype).removeprefix("torch."), "cfg": cfg.to_dict(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.process_memory", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"measuring peak memory failed ({done.returncode}): {lines[-1]}")
    return float(done.stdout)


def decode_some(task: dict[str, Any]) -> None:
    """Do what a process is asked for by :func:`peak_memory`."""
    torch.set_num_threads(task["threads"])
    dtype = getattr(torch, task["dtype"])
    config = Qwen2Config.from_dict(task["config"])
    model = random_model(config, dtype)
    if task["side"] == "delta":
        enable(model, DeltaConfig.from_dict(task["cfg"]))
        cache: DynamicCache = DeltaCache(model.config)
    else:
        cache = DynamicCache(config=model.config)
    fill_cache(cache, config, task["context"], dtype)
    for _ in range(_STEPS):
        decode_step(model, cache)


def high_water_mib() -> float:
    """High-water mark of this process's resident set, in MiB."""
    # VmHWM belongs to this program alone; what getrusage reports on Linux starts at the size of
    # the process that started it.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    decode_some(json.loads(sys.argv[1]))
    print(high_water_mib())
