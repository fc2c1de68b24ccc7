"""Runs scripts in forks of one process, which imports vLLM once: that takes longer than most jobs.

A line of JSON on stdin asks for a run: ``script``, ``arguments``, ``folder`` (to run in), ``log``
(a file for all that it says), ``seconds`` (after which it is ended) and ``environment``. A line on
stdout is its exit code. With ``TRITON_ON_CPU`` in the environment the script is run anew, by
with_triton.py: what vLLM has there is decided while it is imported.
"""

import gc
import json
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path


def import_vllm():
    import compressed_tensors  # noqa: F401
    import vllm.entrypoints.launchers.cli_args
    import vllm.entrypoints.llm
    import vllm.model_executor.layers.quantization.online.base
    import vllm.model_executor.models.llama
    import vllm.v1.attention.backends.cpu_attn
    import vllm.v1.core.sched.scheduler
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform
    from vllm.v1.executor import multiproc_executor

    lazy = registry._LazyRegisteredModel
    inspect = lazy.inspect_model_cls

    def inspect_here(model):
        """Without a process for each class, which imports vLLM again so that no GPU is touched."""
        if model.module_name.startswith("vllm."):
            return registry._ModelInfo.from_model_cls(model.load_model_cls())
        return inspect(model)

    lazy.inspect_model_cls = inspect_here
    # Ranks are forks, too: on CPUs vLLM has each of them import all of it again.
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    # Once for all engines: both look through everything that is imported. vLLM 0.32 cannot look
    # through numba, which drafts need, so it comes afterwards.
    configure_logging(LoggingConfig())
    current_platform.register_triton_kernel_overrides()
    type(current_platform).register_triton_kernel_overrides = lambda *_: None
    import numba  # noqa: F401

    # What is shared is not looked through in every process, nor when its engine ends.
    gc.freeze()
    gc.unfreeze = lambda: None


def become(asked):
    """Take on what was asked for, but for the script."""
    import torch

    signal.alarm(asked["seconds"])
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for new, old in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(new, old)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    # Read when it was imported.
    torch._dynamo.config.disable = os.environ.get("TORCH_COMPILE_DISABLE") == "1"
    sys.argv = [asked["script"], *asked["arguments"]]


def next_run(answers):
    """What is asked for, in a process of its own; None at the end, in this one."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    return None


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like
    import_vllm()
    asked = next_run(answers)
    if asked is not None:
        become(asked)
        if "TRITON_ON_CPU" in os.environ:
            triton = str(Path(__file__).with_name("with_triton.py"))
            os.execv(sys.executable, [sys.executable, triton, *sys.argv])
        runpy.run_path(asked["script"], run_name="__main__")
