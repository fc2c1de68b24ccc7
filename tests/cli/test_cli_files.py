"""Files that commands write: refused before the work begins, and no result is lost at its end."""

import json
from pathlib import Path

import pytest
from matplotlib.backend_bases import FigureCanvasBase

from deltadecode import DeltaConfig
from deltadecode.cli.files import PICTURES

TASK = ["--task", "chain:steps=1:distractors=1"]
CALIBRATE = [
    "calibrate", "MODEL", *TASK, "--samples", "2", "--delta-layers", "2", "--rows", "4",
    "--page-size", "2", "--budget-pages", "6", "--recent-pages", "2", "--device", "cpu",
]  # fmt: skip
EVAL = ["eval", "MODEL", *TASK, "--samples", "1", "--policies", "full", "--device", "cpu"]
INSPECT = ["inspect", "MODEL", *TASK, "--max-new-tokens", "30", "--loss-tokens", "0",
           "--page-size", "2", "--device", "cpu"]  # fmt: skip
FILES = [
    (CALIBRATE, "--out"),
    (CALIBRATE, "-o"),
    (CALIBRATE, "--figure"),
]
FOLDERS = [
    (INSPECT, "--out"),
    (INSPECT, "-o"),
    (INSPECT, "--results"),
    (EVAL, "--out"),
    (EVAL, "--results"),
    ([*EVAL, "--lm-eval", "x"], "--out"),
]


@pytest.fixture
def of(model):
    """A command with the tiny model in its place."""
    return lambda command: [str(model) if part == "MODEL" else part for part in command]


@pytest.fixture(autouse=True)
def _nothing_lies_about(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("command", "option"), FILES)
@pytest.mark.parametrize("place", ["", "folder", "folder.png", "no/file.png", "/proc/none.png"])
def test_a_file_that_cannot_be_written_is_refused_first(
    refused, of, nothing_loads, command, option, place
):
    for folder in ("folder", "folder.png"):
        Path(folder).mkdir()
    if option == "--figure" and place == "folder":
        Path("folder.png").rmdir()
        Path("folder").rename("folder.png")  # which a figure without a suffix becomes
    error = refused(*of(command), option, place)
    assert "--figure" in error or "--out" in error
    assert repr(place) in error or f"{place}.png" in error
    assert "loaded" not in error


@pytest.mark.parametrize(("command", "option"), FOLDERS)
@pytest.mark.parametrize("place", ["", "file", "file/below", "/proc/none"])
def test_a_folder_that_cannot_be_written_is_refused_first(
    refused, of, nothing_loads, command, option, place
):
    Path("file").write_text("kept")
    error = refused(*of(command), option, place)
    assert "--results" in error or "--out" in error
    assert repr(place) in error and "loaded" not in error
    assert Path("file").read_text() == "kept"
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_a_check_leaves_files_as_they_are(refused, of, nothing_loads):
    Path("plan.json").write_text("kept")
    refused(*of(CALIBRATE), "-o", "plan.json", "--figure", "new.png", "--dtype", "int8")
    refused(*of(CALIBRATE), "-o", "plan.json", "--figure", "new.png", "--recall", "0.5")
    assert [path.name for path in Path().iterdir()] == ["plan.json"]
    assert Path("plan.json").read_text() == "kept"


def test_one_file_is_not_two_outputs(refused, of, nothing_loads):
    assert "two files" in refused(*of(CALIBRATE), "-o", "a.png", "--figure", "a.png")


def test_documents_without_a_place_for_tables_are_refused_first(refused, of, nothing_loads):
    Path("docs.md").write_text("no marks")
    results = ["--results", "results"]
    assert "needs --results" in refused(*of(EVAL), "--docs", "docs.md")
    assert "has no <!-- eval:samples -->" in refused(*of(EVAL), *results, "--docs", "docs.md")
    assert "cannot read 'none.md'" in refused(*of(EVAL), *results, "--docs", "none.md")


def test_the_harness_writes_no_result_file(refused, of, nothing_loads):
    assert "--lm-eval goes with" in refused(*of(EVAL), "--lm-eval", "x", "--results", "results")


# At the end


def test_a_plan_that_cannot_be_written_is_still_printed(run, of):
    command = [*of(CALIBRATE), "-o", "/dev/full", "--figure", "picture.png", "--resume", "state"]
    code, out, err = run(*command, "--json")
    assert code == 1 and json.loads(out)["plans"]["calibrated"]["delta_layers"]
    assert err.splitlines()[-1] == (
        "deltadecode: error: cannot write '/dev/full': No space left on device"
    )
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(*command)
    assert code == 1 and "even spread" in out


def test_an_inspection_that_cannot_be_written_is_still_printed(run, of, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "index.html")

    monkeypatch.setattr("deltadecode.lab.inspection.page.write_page", full)
    code, out, err = run(*of(INSPECT), "-o", "report", "--results", "results", "--json")
    assert code == 1 and json.loads(out)["layers"] == list(range(6))
    assert err.splitlines()[-1] == (
        "deltadecode: error: cannot write 'report': No space left on device"
    )
    assert not Path("report").exists()
    assert [path.suffix for path in Path("results").iterdir()] == [".json"]


def test_an_evaluation_that_cannot_be_written_is_still_printed(run, of, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "eval.json")

    monkeypatch.setattr("deltadecode.lab.evaluation.report.write_result", full)
    code, out, err = run(*of(EVAL), "--results", "results", "--json")
    assert code == 1 and json.loads(out)["rows"][0]["policy"] == "full"
    assert err.splitlines()[-1] == (
        "deltadecode: error: cannot write 'results': No space left on device"
    )


# Figures


def test_a_figure_without_a_suffix_is_a_png_and_named_so(run, of):
    code, _, err = run(*of(CALIBRATE), "--figure", "picture")
    assert code == 0
    assert "wrote picture.png\n" in err
    assert [path.name for path in Path().iterdir()] == ["picture.png"]


@pytest.mark.parametrize("name", ["picture.xyz", "shift.v2", "plan.json"])
def test_a_figure_of_an_unknown_kind_is_refused_first(refused, of, nothing_loads, name):
    error = refused(*of(CALIBRATE), "--figure", name)
    assert "--figure must end in .png, .pdf, .svg, .eps, .jpg, .jpeg, .tif, .tiff, .webp, " in error
    assert repr(name) in error


def test_matplotlib_writes_every_kind_of_figure():
    assert {suffix.removeprefix(".") for suffix in PICTURES} <= set(
        FigureCanvasBase.get_supported_filetypes()
    )


# Together or not at all


def test_an_interrupt_while_it_draws_leaves_the_old_report(run, of, monkeypatch):
    command = [*of(INSPECT), "-o", "report"]
    assert run(*command)[0] == 0
    Path("report/notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in Path("report").iterdir()}

    def interrupted(report, pages, folder):
        (folder / "shift.png").write_text("new")
        raise KeyboardInterrupt

    monkeypatch.setattr("deltadecode.lab.inspection.figures.draw", interrupted)
    code, _, err = run(*command, "--epsilon", "0.5")
    assert code == 130 and err.splitlines()[-1] == "deltadecode: error: interrupted"
    assert {path.name: path.read_bytes() for path in Path("report").iterdir()} == before
    assert run(*of(INSPECT), "-o", "other")[0] == 130
    assert not Path("other").exists()


def test_a_plan_with_a_byte_order_mark_is_read(run, model):
    DeltaConfig(page_size=4, budget_pages=10, delta_layers=(2,)).save("plan.json")
    Path("marked.json").write_text(Path("plan.json").read_text(), encoding="utf-8-sig")
    arguments = ["generate", model, "Facts", "--max-new-tokens", "1", "--json", "--plan"]
    assert json.loads(run(*arguments, "marked.json")[1])["config"]["page_size"] == 4
