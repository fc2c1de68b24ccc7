"""A model's name is one for every command that takes a model."""

import json
import sys

import pytest

from deltadecode.cli import loading
from deltadecode.lab.tasks import model_path

TASK = ["--task", "chain:steps=1:distractors=1", "--device", "cpu"]
COMMANDS = [
    ["info", "NAME"],
    ["generate", "NAME", "Facts bada", "--max-new-tokens", "1"],
    ["calibrate", "NAME", *TASK, "--samples", "2", "--delta-layers", "2", "--rows", "4",
     "--page-size", "2", "--budget-pages", "6", "--recent-pages", "2"],
    ["eval", "NAME", *TASK, "--samples", "1", "--policies", "full"],
    ["inspect", "NAME", *TASK, "--max-new-tokens", "30", "--loss-tokens", "0", "--page-size",
     "2"],
    ["serve", "NAME", "--dry-run"],
]  # fmt: skip


def named(command, name):
    return [name if part == "NAME" else part for part in command]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_row_of_the_table_names_a_model_for_every_command(
    run, model, monkeypatch, tmp_path, command
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(loading.NAMED_MODELS, "tiny", lambda: model)
    code, out, err = run(*named(command, "tiny"), "--json")
    assert code == 0, err
    assert isinstance(json.loads(out), dict)


@pytest.mark.parametrize("command", [*COMMANDS, ["demo"]], ids=lambda command: command[0])
def test_without_its_distribution_the_embedded_model_is_refused_in_one_line(
    refused, monkeypatch, tmp_path, command
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "deltadecode_embedded", None)
    assert refused(*named(command, "embedded")) == (
        "deltadecode: error: the embedded model is not installed; "
        "pip install 'deltadecode[demo]' brings it, and in a clone of the repository "
        "pip install ./packages/embedded\n"
    )


def test_the_embedded_model_is_planned_and_generates_by_its_name(run):
    plan = json.loads(run("info", "embedded", "--json")[1])["model"]
    assert (plan["layers"], plan["plan_from"]) == (24, "profile")
    arguments = ["generate", "embedded", "Facts", "--max-new-tokens", "1", "--json"]
    assert json.loads(run(*arguments)[1])["model"] == "embedded"


@pytest.mark.parametrize(
    ("theirs", "added"),
    [([], ["--served-model-name", "embedded"]), (["--served_model_name=x"], [])],
)
def test_the_embedded_model_is_served_from_its_folder_under_its_name(run, theirs, added):
    line = json.loads(run("serve", "embedded", *theirs, "--dry-run", "--json")[1])["command"]
    assert line[:3] == ["vllm", "serve", str(model_path())]
    assert line[7:] == [*theirs, *added]
