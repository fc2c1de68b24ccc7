"""Runs a script where vLLM finds Triton on this CPU: ``python with_triton.py SCRIPT [ARGUMENT]``.

Its kernels go through Triton's interpreter. With Triton vLLM 0.32 takes its second model runner for
all models, as it does on GPUs.
"""

import os
import runpy
import sys
from types import SimpleNamespace

# Read when Triton is imported.
os.environ["TRITON_INTERPRET"] = "1"

from fork_server import import_vllm
from triton.backends import backends

if __name__ == "__main__":
    # What vLLM looks for while it is imported, and Triton of PyPI has not.
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    import_vllm()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
