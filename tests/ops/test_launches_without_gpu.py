"""What is handed to the driver, by kernels that are compiled but never run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ops_oracle import needs_triton

pytestmark = needs_triton
ROWS = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("launch_kernels.py")), str(ROWS)],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_compiles_after_what_is_compiled_ahead(found):
    assert set(found["ahead"]) == {"attend", "finish", "select"} and not found["later"]


def test_a_direct_launch_hands_over_what_an_ordinary_one_does(found):
    step = ["attend", "finish", "select", "attend", "finish"]
    launches = found["launched"]
    assert [name for name, _, _ in launches] == step * 6
    first, second, third = (launches[i : i + 5] for i in range(0, 15, 5))
    assert all(ordinary for _, ordinary, _ in first)
    assert not any(ordinary for _, ordinary, _ in second + third)
    handed_over = [[given for _, _, given in step] for step in (first, second, third)]
    assert handed_over[0] == handed_over[1] == handed_over[2]


def test_queries_at_odd_addresses_are_left_to_triton(found):
    ordinary = {(name, ordinary) for name, ordinary, _ in found["launched"][15:]}
    assert ordinary & {("attend", True), ("attend", False)} == {("attend", True)}
    assert ("select", True) not in ordinary
