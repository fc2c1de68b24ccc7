"""Variables of the environment that both sides of a benchmark get, and what tells them apart."""

import json
import sys
from functools import partial

import pytest
from test_e2e import fake as fake  # a fixture of this module too
from test_serve import measured

import benchmarks.e2e.run as e2e
from benchmarks.command import launch
from benchmarks.e2e.__main__ import e2e as e2e_command
from benchmarks.serve.__main__ import serve as serve_command
from benchmarks.serve.client import values
from benchmarks.serve.options import make_options
from benchmarks.serve.report import make_result, runs_table
from benchmarks.serve.run import check_facts, write_json
from benchmarks.serve.server import Server
from benchmarks.variables import parse_variables


def test_variables_are_names_and_values():
    assert parse_variables(["A_1=b=c", "D=", "A_1=b=c"]) == {"A_1": "b=c", "D": ""}
    assert parse_variables([]) == {}


@pytest.mark.parametrize("wrong", ["A", "=1", "A B=1", "1A=2", ""])
def test_anything_else_is_refused(wrong):
    with pytest.raises(ValueError, match="--env must be NAME=VALUE"):
        parse_variables([wrong])


@pytest.mark.parametrize("command", [e2e_command, serve_command])
@pytest.mark.parametrize("taken", ["PYTHONPATH", "NCCL_NVLS_ENABLE", "VLLM_PLUGINS"])
def test_what_the_benchmark_sets_is_refused(outcome, command, taken):
    code, out, err = outcome(partial(launch, command), "--env", f"{taken}=1")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert f"--env must leave {taken}" in err


def test_one_name_has_one_value():
    with pytest.raises(ValueError, match="gives A twice, as '1' and as '2'"):
        parse_variables(["A=1", "A=2"])


def test_both_engines_get_them_and_the_result_says_so(fake):
    found = e2e.run(fake(["step"], variables=["DELTADECODE_FAKE=x y"]))
    assert {facts["variable"] for facts in found["engines"].values()} == {"x y"}
    assert found["environment"] == {"DELTADECODE_FAKE": "x y"}
    assert found["command"].endswith("--env 'DELTADECODE_FAKE=x y'")
    plain = e2e.run(fake(["step"]))
    assert {facts["variable"] for facts in plain["engines"].values()} == {None}
    assert plain["environment"] == {} and "--env" not in plain["command"]


def test_rows_say_for_which_part_of_the_time_an_engine_waited(fake):
    for row in e2e.run(fake(["step", "headline", "prefill"]))["rows"]:
        assert (row["waited_theirs"], row["waited_ours"]) == (0.5, 0.25)
    (profile,) = e2e.run(fake(["profile"]))["rows"]
    assert profile["waited_ours"] is None


ENVIRONMENT = """
import http.server, os, sys
open(sys.argv[1], "w").write(os.environ.get("DELTADECODE_FAKE", "none"))
print("INFO Using V2 Model Runner", flush=True)
address = "127.0.0.1", int(sys.argv[-1])
http.server.HTTPServer(address, http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def test_a_server_gets_them_and_says_which_model_runner_it_has(tmp_path):
    (tmp_path / "health").touch()
    line = [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})\n{ENVIRONMENT}", "seen"]
    server = Server("stock", line, tmp_path, {"DELTADECODE_FAKE": "x y"})
    try:
        server.wait(60)
        assert (tmp_path / "seen").read_text() == "x y"
        assert server.facts()["model_runner"] == 2
    finally:
        server.stop()


def load(raw, **options):
    return make_options(shape="tiny", names=["chat"], rates=["inf"], raw=raw, **options)


def test_runs_with_other_variables_are_not_mixed_in(tmp_path):
    check_facts(load(tmp_path, variables=["A=1"]))
    check_facts(load(tmp_path, variables=["A=1"]))
    for other in ([], ["A=2"], ["A=1", "B=1"]):
        with pytest.raises(ValueError, match="has runs with environment"):
            check_facts(load(tmp_path, variables=other))


def test_a_folder_that_names_no_variables_has_none(tmp_path):
    check_facts(load(tmp_path))
    facts = json.loads((tmp_path / "facts.json").read_text())
    write_json(tmp_path / "facts.json", {k: v for k, v in facts.items() if k != "environment"})
    check_facts(load(tmp_path))
    with pytest.raises(ValueError, match="has runs with environment None"):
        check_facts(load(tmp_path, variables=["A=1"]))


def test_the_table_of_runs_names_them_before_the_flags(tmp_path):
    options = load(tmp_path / "raw", variables=["A=1"], flags=["--max-num-seqs", "8"])
    check_facts(options)
    write_json(tmp_path / "serve-one.json", make_result(options))
    assert "| `A=1 --max-num-seqs 8` |" in runs_table([tmp_path / "serve-one.json"], tmp_path)


def test_a_run_keeps_when_each_request_came_and_its_first_token():
    run = measured(1.0, 1.0, requests=2)
    assert "arrivals" not in values(run)
    found = values({**run, "start_times": [7.25, 7.0], "ttfts": [0.0301, 0.1]})
    assert found["arrivals"] == [[0.25, 30.1], [0.0, 100.0]]
