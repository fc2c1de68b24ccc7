"""Peak memory of decoding, one side per process: ``python -m benchmarks.memory``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from transformers import DynamicCache, Qwen2Config

from deltadecode.config import DeltaConfig
from deltadecode.engines.transformers import DeltaCache, enable
from deltadecode.lab.steptime import decode_step, fill_cache, random_model

Side = Literal["full", "delta"]
_STEPS = 4


def peak_memory(
    side: Side, config: Qwen2Config, context: int, dtype: torch.dtype, cfg: DeltaConfig
) -> float:
    """Measure the peak memory of a fresh process that decodes a few tokens.

    Parameters
    ----------
    side : str
        ``"full"`` (stock ``sdpa`` and ``DynamicCache``) or ``"delta"``.
    config : Qwen2Config
        Shape of the random model.
    context : int
        Tokens in the cache before the first step.
    dtype : torch.dtype
        Of weights and cache.
    cfg : DeltaConfig
        Plan and budget of DELTA.

    Returns
    -------
    float
        High-water mark of the resident set, in MiB: interpreter, weights, cache and all.

    Raises
    ------
    RuntimeError
        When the process fails.
    """
    task = {
        "side": side,
        "config": config.to_dict(),
        "context": context,
        "dtype": str(dtype).removeprefix("torch."),
        "cfg": asdict(cfg),
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", __name__, json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"measuring peak memory failed ({done.returncode}): {lines[-1]}")
    return float(done.stdout)


def main() -> None:
    """Run one side, as :func:`peak_memory` asks for it, and print its peak in MiB."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", help="JSON object: side, config, context, dtype, cfg, threads")
    task = json.loads(parser.parse_args().task)
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
    print(high_water_mib())


def high_water_mib() -> float:
    """High-water mark of this process's resident set, in MiB.

    Returns
    -------
    float
    """
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
    main()
