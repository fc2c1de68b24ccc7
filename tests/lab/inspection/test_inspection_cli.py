"""``deltadecode inspect``: one page, its figures and numbers; one line for every mistake."""

import base64
import json
import re
from functools import partial

import numpy as np
import pytest
from calibration_cases import save_tiny_checkpoint

from deltadecode.cli import main
from deltadecode.lab.inspection.names import FIGURE_FILES

QUICK = ["--device", "cpu", "--max-new-tokens", "30", "--loss-tokens", "8"]
TASK = ["--task", "chain:steps=8:distractors=4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model that writes nonsense and never ends it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_tiny_checkpoint(folder, initializer_range=0.4, eos_token_id=None)


@pytest.fixture
def run(outcome):
    return partial(outcome, lambda arguments: main(["inspect", *arguments]))


def test_a_report_is_a_page_figures_and_numbers(run, model, tmp_path):
    out_folder, results = tmp_path / "r", tmp_path / "results"
    code, out, err = run(model, *TASK, *QUICK, "-o", out_folder, "--json", "--page-size", 4,
                         "--results", results, "--tag", "tiny")  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert report == json.loads((out_folder / "report.json").read_text())
    assert {path.name for path in out_folder.iterdir()} == {
        "index.html", "report.json", *FIGURE_FILES
    }  # fmt: skip
    for name in FIGURE_FILES:
        assert (out_folder / name).read_bytes().startswith(b"\x89PNG")
    depth = len(report["layers"])
    assert depth == 6 and len(report["shift"]) == 6
    assert np.shape(report["captured"]) == np.shape(report["overlap"]) == (6, 6)
    assert np.shape(report["entropy_bits"]) == (6, 2)
    assert [each["layer"] for each in report["recall"]] == [
        layer for layer, role in enumerate(report["plan"]["roles"]) if role == "sparse"
    ]
    for each in report["recall"]:
        assert 0 < each["captured"] <= 1 and 0 < each["best"] <= 1
    assert report["sinks"]["epsilon"] == 0.3 and len(report["sinks"]["layers"]) == 6
    assert report["losses"]["steps"] == 8 and report["losses"]["removal"][0]["agreement"] == 1.0
    assert [each["sink_pages"] for each in report["losses"]["sink_pages"]] == [0, 1, 2, 4]
    assert report["text"] == "task chain:steps=8:distractors=4, seed 3000000000"
    (written,) = results.iterdir()
    found = json.loads(written.read_text())
    assert re.fullmatch(r"inspection-\d{8}-tiny.json", written.name)
    assert found["benchmark"] == "inspection" and found["report"]["layers"] == report["layers"]
    for name in ("command", "commit", "machine", "versions"):
        assert name in found
    assert all({"case", "peer", "unit", "ours", "theirs", "ratio"} <= set(r) for r in found["rows"])
    # Again into the same folder: it is ours.
    code, out, _ = run(model, *TASK, *QUICK, "-o", out_folder, "--page-size", 4)
    assert code == 0 and "sink rate" in out


def test_the_page_holds_the_page_map(run, model, tmp_path):
    _, out, _ = run(model, *TASK, *QUICK, "-o", tmp_path / "r", "--json", "--page-size", 4)
    page = (tmp_path / "r" / "index.html").read_text()
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    data = json.loads(text)
    assert data["report"] == json.loads(out)
    drawn = data["map"]
    steps, layers, pages = drawn["shape"]
    levels = np.frombuffer(base64.b64decode(drawn["levels"]), np.uint8).reshape(drawn["shape"])
    mass = 10 ** (drawn["floor"] * (1 - levels / 250))
    assert layers == 6 and steps == data["report"]["tokens"]["observed_steps"] == 29
    assert pages == -(-drawn["lengths"][-1] // 4)
    # Each layer's attention adds up to 1, but for what is too little to be told from none.
    np.testing.assert_allclose(np.where(levels > 0, mass, 0).sum(axis=2), 1, atol=0.05)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(drawn["selected"]), np.uint8))
    selected = bits[: levels.size].reshape(drawn["shape"])
    assert (selected[-1].sum(axis=1) == data["report"]["plan"]["budget_pages"]).all()


def test_a_prompt_that_looks_like_a_page_does_no_harm(run, model, tmp_path):
    code, _, err = run(model, "--prompt", "</script><b>{{script}} " * 30, *QUICK, "--page-size", 4,
                       "-o", tmp_path / "r")  # fmt: skip
    assert code == 0, err
    assert (tmp_path / "r" / "index.html").read_text().count("<script") >= 3


def test_a_real_text_goes_on_by_itself(run, model, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("mu 3 ; po 4 ; " * 40)
    arguments = [model, *QUICK, "--page-size", 4, "-o", tmp_path / "r", "--json"]
    task = f"text:file={words}:context=80:tokens=20"
    _, out, _ = run(*arguments, "--task", task)
    report = json.loads(out)
    assert report["text"] == f"task {task}, seed 3000000000"
    assert report["tokens"]["prompt"] == 80 and report["tokens"]["new"] == 21
    assert report["losses"]["removal"][0]["loss"] > 0.1  # the text's own loss, not the model's
    # Without any: Python's documentation, as much of it as the model has positions for.
    _, out, _ = run(*arguments)
    report = json.loads(out)
    assert report["text"].startswith("task text:stdlib-docs:context=482:tokens=30")
    assert report["tokens"]["prompt"] + report["tokens"]["new"] == 513


def test_a_short_text_lowers_the_budget_and_says_so(run, model, tmp_path):
    code, out, err = run(model, *TASK, *QUICK, "--page-size", 4, "-o", tmp_path / "r", "--json")
    assert code == 0 and "short for the plan's budget of 96 pages" in err
    assert f"budget of {json.loads(out)['plan']['budget_pages']}" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a"], "needs 8 pages of 8 tokens by half of its new tokens, got 1 tokens"),
        (["--prompt", " "], "the prompt must not be empty, got ' '"),
        (["--prompt", "a", "--task", "chain"], "give one of --prompt, --prompt-file and --task"),
        (["--prompt-file", "no/such"], "cannot read prompt file 'no/such'"),
        (["--task", "chian"], "unknown task 'chian'; there are chain"),
        (["--task", "text:stdlib-docs:context=600:tokens=9"], "longer than the model's 512"),
        ([*TASK, "--epsilon", "1.5"], "--epsilon must be between 0 and 1, got 1.5"),
        ([*TASK, "--budget-pages", "90"], "must be less than the 20 pages of the text, got 90"),
        ([*TASK, "--delta-layers", "9"], "delta_layers must be in 0..5 for a model of 6 layers"),
        ([*TASK, "--tag", "a/b"], "tag must be letters"),
        (["--task", "chain:steps=90:distractors=30"], "must not be longer than the model's 512"),
    ],
)
def test_mistakes_are_one_line(run, model, tmp_path, arguments, message):
    code, out, err = run(model, *arguments, *QUICK, "-o", tmp_path / "r")
    assert code == 2 and out == ""
    assert err.startswith("deltadecode: error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["index.html", "report.json", "map.png"])
def test_a_foreign_file_is_not_overwritten(run, model, tmp_path, name):
    (tmp_path / name).write_text("{}")
    code, _, err = run(model, *TASK, *QUICK, "-o", tmp_path)
    assert code == 2 and err.count("\n") == 1
    assert "is there and no report of 'deltadecode inspect' is; choose another --out" in err
    assert (tmp_path / name).read_text() == "{}" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_with_other_files_is_taken(run, model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert run(model, *TASK, *QUICK, "--page-size", 4, "-o", tmp_path)[0] == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_the_place_of_the_folder_is_one_line(run, model, tmp_path):
    (tmp_path / "r").write_text("")
    code, _, err = run(model, *TASK, "-o", tmp_path / "r")
    assert code == 2 and "--out must be a folder, got" in err and err.count("\n") == 1


def test_a_missing_library_says_what_to_install(run, model, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "plotly" else find(name)
    )
    code, _, err = run(model, *TASK, "-o", tmp_path / "r")
    assert code == 2 and "needs plotly; pip install 'deltadecode[lab]' brings it" in err


def test_the_figures_have_a_name_each():
    from deltadecode.lab.inspection.figures import _PAINTERS

    assert len(_PAINTERS) == len(FIGURE_FILES)
