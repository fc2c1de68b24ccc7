"""Every process that a benchmark starts has NVLink multicast off."""

import json
import sys

import pytest

from benchmarks import multicast
from benchmarks.processes import Process
from benchmarks.serve.options import make_options
from benchmarks.serve.server import Server

SHOW = "import json, os; print(json.dumps({'ready': dict(os.environ)}), flush=True)"
OFF = {
    "NCCL_NVLS_ENABLE": "0", "NVSHMEM_DISABLE_NVLS": "1", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    for name, value in OFF.items():
        monkeypatch.setenv(name, "1" if value == "0" else "0")


def test_engines_are_started_without_it():
    engine = Process("stock", {}, [sys.executable, "-c", SHOW])
    try:
        found = engine.ready()
    finally:
        engine.stop()
    assert {name: found[name] for name in OFF} == OFF


def test_servers_are_started_without_it(tmp_path):
    server = Server("stock", [sys.executable, "-c", SHOW], tmp_path)
    with pytest.raises(RuntimeError, match="ended with exit code 0"):
        server.wait(60)
    found = json.loads(server.log())["ready"]
    assert {name: found[name] for name in OFF} == OFF


def test_both_servers_leave_the_pass_out_whose_sums_need_it(tmp_path):
    options = make_options(shape="tiny", names=["chat"], raw=tmp_path, output_len=20)
    for side in options.sides:
        line = options.server_command(side, tmp_path)
        (given,) = [word for word in line if word.startswith("--compilation-config")]
        path, _, value = given.partition("=")
        _, part, name = path.split(".")
        assert {part: {name: json.loads(value)}} == multicast.COMPILATION


@pytest.mark.parametrize("flag", ["--compilation-config", "--compilation_config={}", "-cc.mode=0"])
def test_a_flag_that_would_bring_it_back_is_refused(tmp_path, flag):
    with pytest.raises(ValueError, match=r"as in --compilation-config\.mode=0: the benchmark"):
        make_options(shape="tiny", names=["chat"], raw=tmp_path, flags=[flag], output_len=20)


def test_one_value_of_the_compilation_may_be_given(tmp_path):
    flags = ["--compilation-config.mode=0"]
    options = make_options(
        shape="tiny", names=["chat"], raw=tmp_path, flags=flags, output_len=20, input_len=100
    )
    assert options.server_command("stock", tmp_path)[-1:] == flags
