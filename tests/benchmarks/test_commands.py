"""The benchmarks' command lines: results on stdout, one-line errors, exit codes 0, 1, 2, 130."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks.command import command_line, launch

NAMES = [
    *("cpu", "kernels", "e2e", "serve", "soak", "calibration", "evaluation", "policies"),
    *("lossless", "clsa", "memory", "smoke"),
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(outcome):
    """Run a benchmark's command in this process, named before its arguments."""

    def call(name, *arguments):
        command = getattr(import_module(f"benchmarks.{name}.__main__"), name)
        return outcome(partial(launch, command), *arguments)

    return call


@pytest.mark.parametrize("name", NAMES)
def test_help_goes_to_stdout_and_names_the_shared_options(run, name):
    for option in ("--help", "-h"):
        code, out, err = run(name, option)
        assert (code, err) == (0, "")
        assert f"Usage: python -m benchmarks.{name}" in out
        assert "--json" in out and "--out" in out and "--tag" in out


def test_help_comes_from_any_folder_and_imports_no_torch(tmp_path):
    code = (
        "import sys; from benchmarks.command import launch\n"
        "from benchmarks.kernels.__main__ import kernels\n"
        "try: launch(kernels, ['--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_package_lists_its_benchmarks():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    for name in NAMES:
        assert f"python -m benchmarks.{name} " in done.stdout


def test_an_interrupt_ends_with_130_and_one_line(run, monkeypatch):
    from benchmarks.cpu import run as cpu

    def interrupted(**given):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cpu, "run", interrupted)
    assert run("cpu") == (130, "", "deltadecode: error: interrupted\n")


def test_the_command_repeats_the_run():
    given = dict(quick=True, heads=["12/2"], batch=[1, 2], context=[], memory_gib=1.5)
    assert command_line("kernels", **given, base=None, in_turn=False) == (
        "python -m benchmarks.kernels --quick --heads 12/2 --batch 1 --batch 2 --memory-gib 1.5"
    )
    assert command_line("e2e", plan=Path("a folder/my plan.json")).endswith("--plan 'my plan.json'")


def test_cpu_writes_its_result(run, monkeypatch, tmp_path):
    from benchmarks.cpu import run as cpu
    from deltadecode.lab.results import result, row

    found = result("cpu", "python -m benchmarks.cpu", [row("a case", "a peer", "ms", 1.0, 2.0)])
    monkeypatch.setattr(cpu, "run", lambda **given: found)
    code, out, err = run("cpu", "--json", "--out", tmp_path / "new", "--tag", "x")
    assert (code, json.loads(out)) == (0, found)
    (path,) = (tmp_path / "new").iterdir()
    assert json.loads(path.read_text()) == found
    assert path.name in err.replace("\n", "")
    code, out, err = run("cpu")
    assert (code, err) == (0, "")
    assert "2.00×" in out


def test_cpu_refuses_bad_places_before_it_runs(refused, tmp_path):
    assert "'a/b'" in refused("cpu", "--tag", "a/b")
    (tmp_path / "file").write_text("")
    assert "file" in refused("cpu", "--out", tmp_path / "file")


def test_kernels_needs_a_gpu(run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run("kernels", "--quick", "--out", tmp_path / "new")
    assert (code, out) == (1, "")
    assert err == (
        "deltadecode: error: RuntimeError: python -m benchmarks.kernels needs a CUDA GPU; "
        "none was found\n"
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--heads", "12x2"], "'12x2'"),
        (["--heads", "12/5"], "'12/5'"),
        (["--batch", "0"], "0"),
        (["--context", "many"], "many"),
        (["--quick", "--batch", "3"], "[3]"),
        (["--tag", "a/b"], "'a/b'"),
    ],
)
def test_kernels_refuses_what_it_cannot_measure(refused, options, named):
    assert named in refused("kernels", *options)


def test_kernels_passes_its_options_on_and_tells_its_progress(run, monkeypatch, tmp_path):
    from benchmarks.kernels import run as kernels
    from benchmarks.kernels.cases import Shape
    from deltadecode.lab.results import result, row

    found = result("kernels", "a command", [row("a case", "a peer", "us", 1.0, 2.0)])
    found["bandwidth"] = {"copy_tb_s": 4.0}
    given = {}

    def measured(shapes, *, command, memory_gib, progress):
        given.update(shapes=shapes, command=command, memory_gib=memory_gib)
        progress("a shape", 0.25)
        return found

    monkeypatch.setattr(kernels, "run", measured)
    options = ("--heads", "28/4", "--batch", "2", "--context", "99", "--memory-gib", "3")
    code, out, err = run("kernels", *options, "--json", "--out", tmp_path, "--tag", "x")
    assert (code, json.loads(out)) == (0, found)
    assert given["shapes"] == [Shape(28, 4, 2, 99)]
    assert given["command"] == f"python -m benchmarks.kernels {' '.join(options)}"
    assert given["memory_gib"] == 3
    assert "25% a shape" in err
    (path,) = tmp_path.glob("kernels-*-x.json")
    assert json.loads(path.read_text()) == found
    assert "no figure drawn" in err
    code, out, err = run("kernels")
    assert code == 0
    assert "2.00×" in out
