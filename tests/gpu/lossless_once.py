"""One engine in lossless mode on a GPU, and what it said: ``python tests/gpu/lossless_once.py``.

With ``--eager`` it has no CUDA graphs. For a look at a machine that is lent for minutes.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from test_gpu_vllm import ENGINE, PROBLEMS, WORKER, plugin_path
from test_gpu_vllm_lossless import CONFIG, DRAFTING, REQUESTS

from deltadecode.lab.tasks import is_correct

COUNT = 6

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = {
            **ENGINE, "speculative_config": DRAFTING, "disable_log_stats": False,
            "max_num_seqs": 32, "enforce_eager": "--eager" in sys.argv,
        }  # fmt: skip
        job = {"side": "vllm", "config": CONFIG, "engine": engine, "rounds": [REQUESTS[:COUNT]]}
        (folder / "job.json").write_text(json.dumps(job))
        done = subprocess.run(
            [sys.executable, str(WORKER), str(folder / "job.json"), str(folder / "out.json")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            env={**os.environ, "PYTHONPATH": plugin_path(folder)},
        )  # fmt: skip
        if done.returncode:
            lines = done.stdout.splitlines()
            errors = [line for line in lines if "Error" in line or "error" in line]
            first = next((at for at, line in enumerate(lines) if "Traceback" in line), 0)
            print("\n".join([*errors[:12], "-----", *lines[first : first + 60], "-----"]))
            print("\n".join(lines[-40:]))
            sys.exit(1)
        found = json.loads((folder / "out.json").read_text())
    texts = [each["completions"][0]["text"] for each in found["rounds"][0]]
    right = sum(is_correct(*pair) for pair in zip(PROBLEMS, texts, strict=False))
    print(f"right {right}/{COUNT}, accepted {found['accepted']} of {found['drafted']}")
