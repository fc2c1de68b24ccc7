"""Runs ``compile_kernels.py``."""

import os
import subprocess
import sys
from pathlib import Path


def compiled_kernels(dtype, folder):
    """How many kernels compile for queries of a dtype; the folder is for Triton's cache."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), dtype],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)
