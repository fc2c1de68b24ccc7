"""``deltadecode serve``: the ``vllm serve`` line that it makes, and what it refuses before."""

import importlib.machinery
import importlib.util
import json
import os
import shlex
import sys

import pytest
from transformers import DeepseekV3Config, LlamaConfig

from deltadecode import DeltaConfig
from deltadecode.cli import main
from deltadecode_vllm import PROPOSER

HUB = "org/model"


@pytest.fixture
def run(outcome, monkeypatch):
    """Run the command in this process: exit code, stdout, stderr, and what it became."""
    became = []
    monkeypatch.setattr(os, "execvp", lambda file, command: became.append((file, command)))

    def call(*arguments):
        became.clear()
        return *outcome(main, "serve", *arguments), list(became)

    return call


@pytest.fixture
def line(run):
    """The command that --dry-run prints."""

    def call(*arguments):
        code, out, err, became = run(*arguments, "--dry-run", "--json")
        assert (code, err, became) == (0, "", [])
        return json.loads(out)["command"]

    return call


@pytest.fixture
def refused(run):
    """The one line of a refusal, with exit code 2 and before anything is run."""

    def call(*arguments):
        code, out, err, became = run(*arguments)
        assert (code, out, became) == (2, "", [])
        assert err.startswith("deltadecode: error: ")
        assert err.count("\n") == 1 and err.endswith("\n")
        return err

    return call


@pytest.fixture
def vllm(monkeypatch):
    """Whether vLLM is installed."""
    find = importlib.util.find_spec

    def installed(there):
        found = importlib.machinery.ModuleSpec("vllm", None) if there else None
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: found if name == "vllm" else find(name, *rest),
        )

    return installed


@pytest.fixture
def model(tmp_path):
    LlamaConfig(num_hidden_layers=6).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def settings(command):
    assert command[:5] == ["vllm", "serve", command[2], "--attention-backend", "CUSTOM"]
    assert command[5] == "--additional-config"
    return json.loads(command[6])


# The line


def test_without_options_the_plugin_chooses_the_plan(line):
    assert line(HUB) == [
        *("vllm", "serve", HUB, "--attention-backend", "CUSTOM"),
        *("--additional-config", '{"deltadecode": {}}'),
    ]


def test_our_options_become_settings_and_are_not_passed_on(line):
    options = ["--page-size", "32", "--budget-pages", "40", "--recent-pages", "4"]
    options += ["--budget-share", "0.1"]
    options += ["--sink-pages", "1", "--dense-layers", "0", "--delta-layers", "1,9"]
    options += ["--sync-heads", "--min-tokens", "900", "--on-unsupported", "stock"]
    command = line(HUB, *options)
    assert settings(command) == {
        "deltadecode": {
            "page_size": 32,
            "budget_pages": 40,
            "budget_share": 0.1,
            "recent_pages": 4,
            "sink_pages": 1,
            "dense_layers": [0],
            "delta_layers": [1, 9],
            "sync_heads": True,
            "min_tokens": 900,
            "on_unsupported": "stock",
        }
    }
    assert len(command) == 7


def test_our_options_may_have_underscores_as_those_of_vllm(line):
    options = ["--budget_pages", "40", "--on_unsupported=stock", "--sync_heads"]
    command = line(HUB, *options, "--max_model_len", "900")
    ours = {"budget_pages": 40, "sync_heads": True, "on_unsupported": "stock"}
    assert settings(command) == {"deltadecode": ours}
    assert command[7:] == ["--max_model_len", "900"]


def test_options_of_vllm_go_on_in_their_order(line):
    theirs = ["--port", "8001", "-tp", "2", "-dph", "-O3", "--max_model_len=9", "--enforce-eager"]
    theirs += ["--hf-overrides", '{"a": "b c"}', "--compilation-config.level", "3"]
    command = line(HUB, *theirs[:3], "--page-size", "8", *theirs[3:])
    assert command[7:] == theirs
    assert settings(command) == {"deltadecode": {"page_size": 8}}


def test_a_plan_file_is_passed_on_by_its_values(line, tmp_path):
    DeltaConfig(budget_pages=20, delta_layers=(2, 5)).save(tmp_path / "plan.json")
    found = settings(line(HUB, "--plan", tmp_path / "plan.json", "--recent-pages", "3"))
    assert DeltaConfig.from_dict(found["deltadecode"]) == DeltaConfig(
        budget_pages=20, recent_pages=3, delta_layers=(2, 5)
    )


@pytest.mark.parametrize(
    "given",
    [
        ["--additional-config", "{}"],
        ["--additional_config={}"],
        # vLLM takes the start of a name for the whole.
        ["--additional", "{}"],
        ["--ad={}"],
    ],
)
def test_other_additional_config_is_kept(line, given):
    given = [part.replace("{}", '{"other": {"x": 1}}') for part in given]
    command = line(HUB, *given, "--port", "1")
    assert settings(command) == {"other": {"x": 1}, "deltadecode": {}}
    assert command[7:] == ["--port", "1"]


def test_the_same_settings_in_additional_config_are_no_conflict(line):
    same = '{"deltadecode": {"page_size": 8}}'
    assert settings(line(HUB, "--page-size", "8", "--additional-config", same)) == json.loads(same)


def test_dry_run_prints_the_line_for_a_shell(run):
    code, out, err, became = run("a model", "--port", "1", "--dry-run")
    assert (code, err, became) == (0, "", [])
    assert out.count("\n") == 1
    assert shlex.split(out)[:3] == ["vllm", "serve", "a model"]
    assert shlex.split(out)[-2:] == ["--port", "1"]


# Running it


def test_it_prints_the_line_and_becomes_it(run, vllm, monkeypatch, tmp_path):
    vllm(True)
    script = tmp_path / "bin" / "vllm"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    monkeypatch.setattr(sys, "executable", str(script.parent / "python"))
    code, out, err, became = run(HUB, "--port", "1")
    assert (code, out) == (0, "")
    ((file, command),) = became
    assert file == "vllm" and command[:3] == ["vllm", "serve", HUB]
    assert shlex.split(err) == command
    # A script of another environment would not find the plugin.
    monkeypatch.setattr(sys, "executable", str(tmp_path / "other" / "python"))
    ((file, command),) = run(HUB)[3]
    assert file == sys.executable
    assert command[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", HUB]


def test_help_is_ours(run):
    code, out, err, _ = run("--help")
    assert (code, err) == (0, "")
    assert "--budget-pages" in out and "--dry-run" in out


# Refusals


def test_without_vllm_it_says_how_to_get_it(refused, vllm):
    vllm(False)
    assert refused(HUB) == (
        "deltadecode: error: vLLM is not installed: pip install 'deltadecode[vllm]'\n"
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--attention-backend", "FLASH_ATTN"], "--attention-backend"),
        (["--attention_backend=FLASH_ATTN"], "FLASH_ATTN"),
        (["--attention-back", "FLASH_ATTN"], "got '--attention-back' too"),
        (["--attention-config.backend", "FLASH_ATTN"], "got '--attention-config.backend' too"),
        (['--attention-conf={"backend": "FLASH_ATTN"}'], "--attention-backend is CUSTOM"),
        (["-ac", '{"backend": "FLASH_ATTN"}'], "got '-ac' too"),
        (["--additional-config", '{"deltadecode": {"page_size": 8}}'], '"page_size": 8'),
        (["--additional-config", '{"deltadecode": 1}', "--page-size", "8"], '"page_size": 8'),
        (["--additional-config", "{"], "'{'"),
        (["--additional-config", "[1]"], "'[1]'"),
        (["--additional-config", "[" * 100_000], "--additional-config is not JSON: maximum"),
        (["--additional-config"], "''"),
        (["--additional-config", "{}", "--additional-config", '{"a": 1}'], '{"a": 1}'),
        (["--additional-config.other", "1"], "--additional-config.other"),
        (["--budget-pages", "8"], "8 <= 8 + 1"),
        (["--page-size", "0"], "0"),
        (["--budget-share", "1"], "[0, 1), got 1.0"),
        (["--page-size", "many"], "many"),
        (["--delta-layers", "9,2"], "2"),
        (["--delta-layers", "2;9"], "'2;9'"),
        (["--dense-layers", "0,3", "--delta-layers", "2"], "2"),
        (["--plan", "none.json"], "'none.json'"),
        (["--on-unsupported", "maybe"], "maybe"),
        (["--json"], "--dry-run"),
    ],
)
def test_bad_input_is_refused_before_vllm_starts(refused, vllm, options, named):
    vllm(True)
    assert named in refused(HUB, *options)


def test_the_model_comes_first(refused):
    assert "'--port'" in refused("--port", "1", HUB)
    assert "'model'" in refused()


@pytest.mark.parametrize("name", ["", "/no/such/folder", "./none", "../none", "~/none"])
def test_a_path_where_nothing_is_has_no_model(refused, vllm, name):
    vllm(True)
    assert f"model path {name!r} does not exist" in refused(name)


def test_a_folder_without_a_configuration_is_no_model(refused, line, vllm, tmp_path):
    vllm(True)
    (tmp_path / "model.safetensors").touch()
    assert f"{str(tmp_path)!r} is not a model folder: it has no config.json" in refused(tmp_path)
    elsewhere = ["--hf-config-path", HUB]
    assert line(tmp_path, *elsewhere)[7:] == elsewhere
    for name in ("params.json", "model.gguf"):  # of Mistral and of llama.cpp
        (tmp_path / name).touch()
        assert line(tmp_path)[2] == str(tmp_path)
        (tmp_path / name).unlink()


def test_a_local_model_has_its_layers_checked(refused, line, vllm, model):
    vllm(True)
    assert "got 9" in refused(model, "--delta-layers", "2,9")
    assert settings(line(model, "--delta-layers", "2,4"))["deltadecode"]["delta_layers"] == [2, 4]


def test_a_local_model_with_nothing_to_plan_needs_leave(refused, line, vllm, tmp_path):
    vllm(True)
    DeepseekV3Config().save_pretrained(tmp_path / "mla")
    assert "--on-unsupported stock serves it without DELTA" in refused(tmp_path / "mla")
    command = line(tmp_path / "mla", "--on-unsupported", "stock")
    assert settings(command) == {"deltadecode": {"on_unsupported": "stock"}}
    err = refused(tmp_path / "mla", "--on-unsupported", "stock", "--lossless")
    assert "multi-head latent attention" in err and "stock" not in err


def test_a_model_that_transformers_does_not_know_is_left_to_vllm(line, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "of-tomorrow"}')
    assert settings(line(tmp_path)) == {"deltadecode": {}}


def test_lossless_mode_drafts_by_itself(line, refused):
    command = line(HUB, "--lossless", "--max-model-len", "4096")
    drafts = json.loads(command[command.index("--speculative-config") + 1])
    assert drafts == {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 4}
    command = line(HUB, "--lossless", "--draft-tokens", "6")
    assert '"num_speculative_tokens": 6' in command[command.index("--speculative-config") + 1]
    assert "--draft-tokens needs --lossless" in refused(HUB, "--draft-tokens", "6")
    for other in (
        "--speculative_config.method=ngram", "--speculative-conf", "--spec-method=ngram", "-sc",
    ):  # fmt: skip
        assert f"leave '{other}' out" in refused(HUB, "--lossless", other)
