"""``deltadecode info``: versions, backends and the plan of a model."""

import importlib.util
import json

import torch

from deltadecode.cli.info import ranges


def test_info_shows_versions_and_the_plan(run, model):
    code, out, err = run("info", model)
    assert (code, err) == (0, "")
    assert torch.__version__ in out
    assert "default plan" in out
    assert "the pages that layer 4 selects" in out


def test_info_json(run, model):
    found = json.loads(run("info", model, "--json")[1])
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0] == "cpu"
    triton = {"triton"} if importlib.util.find_spec("triton") else set()
    assert {"reference", "torch"} | triton == set(found["backends"])
    by_role = {
        (entry["role"], entry["source"]): entry["layers"] for entry in found["model"]["roles"]
    }
    assert by_role == {
        ("dense", None): [0, 1],
        ("delta", None): [2, 4],
        ("sparse", 2): [3],
        ("sparse", 4): [5],
    }
    assert "model" not in json.loads(run("info", "--json")[1])


def test_ranges():
    assert ranges([0, 1, 3, 4, 5, 9]) == "0, 1, 3-5, 9"
