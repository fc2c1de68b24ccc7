"""``deltadecode eval``: one result on stdout, one line for every mistake."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
from calibration_cases import save_tiny_checkpoint

from deltadecode.cli import loading, main
from deltadecode.config import DeltaConfig
from deltadecode.models.clsa import ClsaConfig

TASK = ["--task", "chain:steps=2:distractors=1", "--device", "cpu", "--samples", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model that writes nonsense at once."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_tiny_checkpoint(folder, eos_token_id=1)


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("weights were loaded"))


@pytest.fixture
def run(outcome):
    return partial(outcome, lambda arguments: main(["eval", *arguments]))


def test_an_evaluation_prints_writes_and_continues(run, model, tmp_path):
    arguments = [model, *TASK, "--policies", "full,streaming,tidal-kv:layers=2+", "--budgets", "16",
                 "--out", tmp_path / "s", "--json"]  # fmt: skip
    code, out, _ = run(*arguments)
    found = json.loads(out)
    assert code == 0
    assert [row["policy"] for row in found["rows"]] == ["full", "streaming", "tidal-kv:layers=2+"]
    assert found["settings"]["seed"] == 3_000_000_000
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}
    code, again, _ = run(*arguments)
    assert code == 0 and json.loads(again)["rows"] == found["rows"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()} == times
    code, out, _ = run("--report", tmp_path / "s", "--results", tmp_path / "r", "--tag", "x")
    assert code == 0 and "streaming" in out
    assert len(list((tmp_path / "r").iterdir())) == 4


def test_a_text_is_measured_from_end_to_end(run, model, tmp_path):
    text = tmp_path / "a text: of mine.txt"
    text.write_text(" ".join(str(number) for number in range(3000)))
    task = f"text:file={text}:context=70:tokens=5"
    arguments = [model, "--task", task, "--samples", 3, "--device", "cpu", "--policies",
                 "full,h2o,delta:page_size=4:recent_pages=1:dense_layers=0+1:delta_layers=2+",
                 "--budgets", 16,
                 "--out", tmp_path / "s"]  # fmt: skip
    code, out, _ = run(*arguments, "--json")
    rows = {row["policy"].split(":")[0]: row for row in json.loads(out)["rows"]}
    assert code == 0 and rows["full"]["kl"] == 0 and rows["full"]["perplexity_ratio"] == 1
    assert [rows[name]["rows"] for name in ("full", "delta", "h2o")] == [
        "at once", "at once", "step by step",
    ]  # fmt: skip
    low, high = rows["delta"]["kl_interval"]
    assert low <= rows["delta"]["kl"] <= high
    assert rows["delta"]["attended_fraction"] < 1
    code, out, _ = run(*arguments, "--results", tmp_path / "r")
    assert code == 0 and "KL" in out and "ppl ÷ full" in out
    assert len(list((tmp_path / "r").iterdir())) == 3


def test_an_ablation_runs_by_name(run, model, tmp_path):
    code, out, _ = run(
        model, "--task", "chain:steps=2:distractors=1", "--device", "cpu", "--samples", 1,
        "--ablation", "sinks", "--out", tmp_path, "--json",
    )  # fmt: skip
    policies = [(row["policy"], row["budget"]) for row in json.loads(out)["rows"]]
    assert code == 0
    assert policies == [
        ("full", 0), ("delta", 384), ("delta", 768),
        ("delta:sink_pages=0", 384), ("delta:sink_pages=0", 768),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "quset", "--budgets", "64"], "unknown policy 'quset'; there are full"),
        (["--task", "chian"], "unknown task 'chian'; there are chain, needle"),
        (["--policies", "streaming", "--budgets", "3"], "'streaming' cannot keep to 3 tokens"),
        (["--task", "text:wiki"], "unknown source 'wiki' of task 'text'"),
        (["--task", "text:file=/none"], "cannot read the text '/none': No such file"),
        (["--task", "text:file=/"], "cannot read the text '/': Is a directory"),
        (["--task", "text:stdlib-docs:context=600"], "and the model has 512 positions"),
        (["--task", "text:stdlib-docs:context=9000000"], "context + tokens + 1 are 9000129"),
        (["--policies", ","], "--policies names no policy"),
        (["--policies", "full", "--device", "cuda:9"], "--device must be one of"),
        (["--policies", "h2o", "--attended-fraction", "0.01"], "cannot read as little as"),
        (["--policies", "raas", "--budgets", "32"], "it never evicts the prompt, and one of"),
        (["--policies", "h2o"], "policy 'h2o' needs --budgets or --attended-fraction"),
        (["--budgets", "many"], "--budgets must be whole numbers with commas between, got 'many'"),
        (["--attended-fraction", "2", "--policies", "h2o"], "must be between 0 and 1, got 2.0"),
        (["--ablation", "depth"], "unknown ablation 'depth'; there are layers"),
        (["--ablation", "sinks", "--ablation", "depht"], "unknown ablation 'depht'; there are"),
        (["--ablation", "plans"], "'plans' needs the plans of a calibration"),
        (["--plan", "x.json"], "--plan goes with --ablation plans only"),
        (["--ablation", "plans", "--plan", "x.json"], "cannot read a DeltaConfig from 'x.json'"),
        (["--dtype", "int8"], "--dtype must be float32, bfloat16, float16 or auto, got 'int8'"),
        (["--tag", "a/b"], "tag must be letters"),
        (["--chat", "--policies", "full"], "--chat needs a tokenizer with a chat template"),
        (["--lm-eval", "x", "--ablation", "heads"], "--lm-eval goes with --policies and --budgets"),
    ],
)
def test_mistakes_are_one_line_before_the_weights(
    run, model, no_weights, tmp_path, arguments, message
):
    task = ["--policies", "full"] if "--task" in arguments else TASK
    code, out, err = run(model, *task, "--out", tmp_path / "s", *arguments)
    assert code == 2 and out == ""
    assert err.startswith("deltadecode: error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_a_plan_that_the_model_cannot_have_is_refused_before_the_weights(
    run, model, no_weights, tmp_path
):
    plan = tmp_path / "plan.json"
    DeltaConfig(delta_layers=(2, 99)).save(plan)
    arguments = ["--ablation", "plans", "--plan", plan, "--out", tmp_path / "s"]
    code, _, err = run(model, *TASK, *arguments)
    assert (code, err.count("\n")) == (2, 1) and "got 99" in err


def test_a_model_without_attention_to_plan_is_refused_before_its_weights(run, no_weights, tmp_path):
    ClsaConfig(mode="clsa").save_pretrained(tmp_path / "clsa")
    code, _, err = run(tmp_path / "clsa", *TASK, "--policies", "full", "--out", tmp_path / "s")
    assert (code, err.count("\n")) == (2, 1)
    assert "selects the tokens that it reads by itself; its own generate" in err


def test_a_model_without_a_tokenizer_is_one_line(run, model, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    code, _, err = run(bare, *TASK, "--policies", "full", "--out", tmp_path / "s")
    assert code == 2 and "cannot load the tokenizer of" in err and err.count("\n") == 1


def test_a_foreign_file_is_one_line_and_nothing_runs(run, model, tmp_path):
    arguments = [model, *TASK, "--policies", "full", "--out", tmp_path]
    assert run(*arguments)[0] == 0
    code, _, err = run(*arguments, "--seed", 1)
    assert code == 2 and "its seed is 3000000000, not 1; choose another --out" in err


def test_no_model_and_no_report_is_one_line(run):
    code, _, err = run("--policies", "full")
    assert code == 2 and "Missing argument 'MODEL'" in err


def test_help_names_the_options():
    command = "from deltadecode.cli import main; main(['eval', '--help'])"
    done = subprocess.run(
        [sys.executable, "-c", command],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "160"},
    )  # fmt: skip
    assert "--attended-fraction" in done.stdout


def test_a_run_without_scipy_ends_well_and_a_report_says_what_to_install(
    run, model, tmp_path, monkeypatch
):
    from deltadecode.lab.evaluation import statistics

    monkeypatch.setattr(statistics, "can_report", lambda: False)
    code, out, err = run(model, *TASK, "--policies", "full", "--out", tmp_path / "s")
    assert code == 0 and out == "" and "are complete; compare them with --report" in err
    code, _, err = run("--report", tmp_path / "s")
    assert code == 2 and "pip install 'deltadecode[lab]'" in err and err.count("\n") == 1
