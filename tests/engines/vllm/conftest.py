"""vLLM runs in processes of its own, as its users run it; nothing here imports it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# vLLM has an environment of its own (make test-vllm); elsewhere these files cannot be imported.
# A folder of that name, such as this one, passes for a package without a file.
if getattr(importlib.util.find_spec("vllm"), "origin", None) is None:
    collect_ignore_glob = ["test_*.py"]
# What vLLM on a small CPU machine needs to start quickly, and to leave the other core alone.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.vllm)


def environment(**more):
    # The interpreter of Triton is for tests of kernels; vLLM takes its presence for a GPU's.
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, **ENVIRONMENT, **more}


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """Runs tests/engines/vllm/vllm_worker.py on a job and returns what it found."""

    def run(job, timeout=900, **more):
        folder = tmp_path_factory.mktemp("vllm")
        out = folder / "found.json"
        (folder / "job.json").write_text(json.dumps(job))
        with (folder / "log").open("w") as log:
            done = subprocess.run(
                [sys.executable, str(HERE / "vllm_worker.py"), str(folder / "job.json"), str(out)],
                stdout=log, stderr=subprocess.STDOUT, timeout=timeout, env=environment(**more),
                check=False,
            )  # fmt: skip
        assert done.returncode == 0, (folder / "log").read_text()[-4000:]
        return json.loads(out.read_text())

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Runs tests/engines/vllm/tiny_worker.py on named runs; returns what each gave, by name."""

    def start(runs, **more):
        folder = tmp_path_factory.mktemp("tiny")
        job = {"folder": str(folder), "runs": list(runs.values()), **more}
        (folder / "job.json").write_text(json.dumps(job))
        with (folder / "log").open("w") as log:
            done = subprocess.run(
                [sys.executable, str(HERE / "tiny_worker.py"), "job.json", "out.json"],
                cwd=folder, stdout=log, stderr=subprocess.STDOUT, timeout=900,
                env=environment(), check=False,
            )  # fmt: skip
        assert done.returncode == 0, (folder / "log").read_text()[-4000:]
        return dict(zip(runs, json.loads((folder / "out.json").read_text()), strict=True))

    return start
