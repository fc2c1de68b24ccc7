"""vLLM runs in processes of its own, as its users run it; nothing here imports it."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
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
    # With drafts vLLM has two threads, each of which spins while it waits for the other.
    "OMP_WAIT_POLICY": "PASSIVE",
    "NUMBA_NUM_THREADS": "1",
    # Engines are eager, but small functions of vLLM's would be compiled anew in every process.
    "TORCH_COMPILE_DISABLE": "1",
}
# Beside it, for scripts.
SCRIPTS = {
    # The engine's core in the same process: its own would import vLLM again.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


# With Triton vLLM takes its second model runner; see with_triton.py.
SECOND_RUNNER = {"TRITON_ON_CPU": "1"}


# Files that take longest, in that order, so that no worker ends alone with one of them.
LONGEST = (
    "embedded", "load", "lossless", "parallel", "data_parallel", "server", "e2e_engine", "batches",
    "drafts", "matrix", "families", "second_runner", "lossless_sampling", "float8", "clsa",
    "refusals", "tiny", "drafters", "min_tokens",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.vllm)
    places = {f"test_vllm_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session", autouse=True)
def named_in_the_report(record_testsuite_property):
    """A JUnit report names what it is of, for benchmarks/smoke."""
    from benchmarks.smoke.run import NAMES
    from deltadecode.lab.results import commit

    for name in NAMES:
        value = commit() if name == "commit" else importlib.metadata.version(name)
        record_testsuite_property(name, value)


def environment(**more):
    # The interpreter of Triton is for tests of kernels; vLLM takes its presence for a GPU's.
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, **ENVIRONMENT, **more}


@pytest.fixture(scope="session")
def run_script(tmp_path_factory):
    """Runs a script of this folder in a fork of a process that has imported vLLM."""
    said = tmp_path_factory.mktemp("forks") / "log"
    with said.open("w") as log, subprocess.Popen(
        [sys.executable, str(HERE / "fork_server.py")], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=log, text=True, env=environment(**SCRIPTS),
    ) as server:  # fmt: skip

        def run(script, *arguments, folder, **more):
            asked = {
                "script": str(HERE / script), "arguments": arguments, "folder": str(folder),
                "log": str(folder / "log"), "seconds": 900,
                "environment": environment(**{**SCRIPTS, **more}),
            }  # fmt: skip
            server.stdin.write(json.dumps(asked) + "\n")
            server.stdin.flush()
            code = server.stdout.readline()
            assert code, said.read_text()[-6000:]
            assert int(code) == 0, (folder / "log").read_text()[-6000:]

        yield run


@pytest.fixture(scope="session")
def run_job(run_script, tmp_path_factory):
    """Runs a script on a job, in JSON, with ``more`` environment; returns what it found."""

    def run(script, job, **more):
        folder = tmp_path_factory.mktemp(Path(script).stem)
        job = {"folder": str(folder), **job}
        (folder / "job.json").write_text(json.dumps(job))
        run_script(script, "job.json", "out.json", folder=folder, **more)
        return json.loads((folder / "out.json").read_text())

    return run


@pytest.fixture(scope="session")
def work(run_job):
    """Runs tests/engines/vllm/vllm_worker.py on a job and returns what it found."""
    return partial(run_job, "vllm_worker.py")


@pytest.fixture(scope="session")
def tiny(run_job):
    """Runs tests/engines/vllm/tiny_worker.py on named runs; returns what each gave, by name.

    ``environment`` is added to that of the script.
    """

    def start(runs, environment=None, **more):
        job = {"runs": list(runs.values()), **more}
        found = run_job("tiny_worker.py", job, **(environment or {}))
        return dict(zip(runs, found, strict=True))

    return start
