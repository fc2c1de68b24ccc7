"""The kernel benchmark as a whole, on the CPU with made-up times, and its result, table, figure."""

import io
import json
import sys

import pytest
import torch
from rich.console import Console

from benchmarks.command import launch
from benchmarks.kernels.__main__ import kernels
from benchmarks.kernels.cases import Shape
from benchmarks.kernels.measure import Bench, measure, our_calls
from benchmarks.kernels.peers import TOPK
from benchmarks.kernels.rows import FLOOR, OURS, ROUNDING, kernel_table
from benchmarks.kernels.timing import Bandwidth, GraphTimer, Runner, Timing
from benchmarks.report import write

FIGURES = "benchmarks.kernels.figures"
SHAPES = [Shape(4, 2, 2, 1100), Shape(4, 2, 1, 40), Shape(6, 2, 1, 1100)]
US = {OURS: 10.0, "a peer": 25.0, TOPK: 30.0}


class MadeUpTimer:
    """Runs every call once; its times depend on the side alone."""

    def prepare(self, calls, call_bytes):
        assert call_bytes > 0
        for call in calls:
            call()
        return Runner(lambda: None, len(calls), graph=True)

    def measure(self, runners):
        sides = {key: key if isinstance(key, str) else key[1] for key in runners}
        return {key: Timing(US[sides[key]], graph=sides[key] == OURS) for key in runners}


class APeer:
    """Our own operations under another name."""

    name = "a peer"
    ops = ("dense", "sparse")

    def calls(self, op, inputs):
        return our_calls(inputs, "reference")[op]


class Broken(APeer):
    """Fails, as a peer does that cannot compile."""

    name = "broken"

    def __init__(self, error):
        self.error = error
        self.asked = 0

    def calls(self, op, inputs):
        self.asked += 1
        raise self.error


def bench(*peers, memory_limit=2**30):
    return Bench(
        timer=MadeUpTimer(),
        bandwidth=Bandwidth(copy=4e12, read=4.4e12),
        device=torch.device("cpu"),
        backend="torch",
        l2_bytes=2**18,
        memory_limit=memory_limit,
        peers=list(peers),
    )


def run(made, shapes=SHAPES):
    return measure(made, shapes, "python -m benchmarks.kernels", lambda case, done: None)


@pytest.fixture(scope="module")
def found():
    return run(bench(APeer()))


def rows(found, **wanted):
    return [r for r in found["rows"] if all(r.get(k) == v for k, v in wanted.items())]


def test_a_result_is_complete_json(found):
    assert json.loads(json.dumps(found)) == found
    assert found["benchmark"] == "kernels"
    assert found["bandwidth"] == {"copy_tb_s": 4.0, "read_tb_s": 4.4}
    assert (found["skipped"], found["peers_missing"]) == ([], {})
    for each in found["rows"]:
        assert {"case", "peer", "unit", "ours", "theirs", "ratio"} <= set(each)


def test_each_operation_stands_beside_the_floor_and_each_peer(found):
    for shape in SHAPES:
        for op in ("dense", "scores", "delta", "sparse"):
            floor, peer = rows(
                found, op=op, heads=shape.heads_label, batch=shape.batch, context=shape.context
            )
            assert (floor["peer"], peer["peer"]) == (FLOOR, "a peer")
            assert (peer["unit"], peer["ours"], peer["theirs"]) == ("us", 10.0, 25.0)
            assert peer["ratio"] == 2.5
            assert (peer["graph_ours"], peer["graph"]) == (True, False)


def test_bandwidths_are_bytes_by_time(found):
    # b = 1,024 bytes, 2 rows of 1,100 tokens; a peer of a Δ-layer writes no logits.
    (delta,) = rows(found, op="delta", batch=2, context=1100, peer="a peer")
    assert delta["bytes"] == 2 * 1100 * (1024 + 2 * 4 * 4)
    assert delta["tb_s"] == pytest.approx(2 * 1100 * 1056 / 10e-6 / 1e12, rel=1e-3)
    assert delta["peer_tb_s"] == pytest.approx(2 * 1100 * 1024 / 25e-6 / 1e12, rel=1e-3)
    assert delta["peer_op"] == "dense"
    assert delta["floor_us"] == pytest.approx(2 * 1100 * 1056 / 4e12 * 1e6, rel=1e-4)
    assert delta["copy_fraction"] == pytest.approx(delta["floor_us"] / 10, abs=1e-3)
    (sparse,) = rows(found, op="sparse", batch=2, context=1100, peer="a peer")
    assert sparse["peer_tb_s"] == pytest.approx(2 * 1024 * 1024 / 25e-6 / 1e12, rel=1e-3)
    (floor,) = rows(found, op="dense", batch=2, context=1100, peer=FLOOR)
    assert floor["theirs"] == floor["floor_us"]


def test_selections_are_measured_once_per_size(found):
    assert [r["case"] for r in rows(found, op="select")] == [
        "select, 64 rows of 2048 pages",
        "select, 2 rows of 69 pages",
        "select, 1 rows of 3 pages",
        "select, 1 rows of 69 pages",
    ]
    assert {r["peer"] for r in rows(found, op="select")} == {TOPK}


def test_errors_are_those_of_bfloat16_once_per_head_shape(found):
    errors = [r for r in found["rows"] if r["unit"] == "relative error"]
    assert {(r["op"], r["heads"], r["peer"]) for r in errors} == {
        (f"error of {op}", heads, peer)
        for op in ("dense", "sparse")
        for heads in ("4/2", "6/2")
        for peer in (ROUNDING, "a peer")
    }
    for each in errors:
        assert 1e-4 < each["ours"] < 1e-2
        assert 0.2 < each["ratio"] < 2


def test_a_shape_that_takes_too_much_memory_is_skipped_and_said():
    told = run(bench(memory_limit=2 * 2**20))
    assert {r["case"] for r in rows(told, op="dense", peer=FLOOR)} == {
        "dense, heads 4/2, batch 1, context 40",
        "dense, heads 6/2, batch 1, context 1100",
    }
    (skipped,) = told["skipped"]
    assert skipped["case"] == "heads 4/2, batch 2, context 1100"
    assert "exceed the limit of 0.0 GiB" in skipped["reason"]


def test_a_peer_that_fails_is_left_out_and_not_asked_again():
    broken = Broken(RuntimeError("no nvcc\nat all"))
    told = run(bench(broken, APeer()))
    assert broken.asked == 1
    assert told["peers_missing"] == {
        "broken": "dense, heads 4/2, batch 2, context 1100: RuntimeError: no nvcc"
    }
    assert len(rows(told, peer="a peer", unit="us")) == 4 * len(SHAPES)


def test_a_peer_that_runs_out_of_memory_is_asked_again():
    broken = Broken(torch.OutOfMemoryError("too much"))
    told = run(bench(broken))
    assert broken.asked == 2 * len(SHAPES)
    assert len(told["skipped"]) == 6
    assert told["peers_missing"] == {}


def test_our_own_failure_ends_the_run():
    made = bench(APeer())
    made.backend = "nonsense"
    with pytest.raises(ValueError, match="nonsense"):
        run(made)


def test_progress_never_goes_back_and_ends_at_one():
    told = []
    measure(bench(), SHAPES[1:2], "", lambda case, done: told.append((case, done)))
    parts = [done for _, done in told]
    assert parts == sorted(parts)
    assert (told[0], parts[-1]) == (("heads 4/2, batch 1, context 40", 0.0), 1.0)


# What is made of a result


def test_the_table_has_a_line_per_case_with_all_sides(found):
    shown = kernel_table(found)
    assert shown.row_count == len({r["case"] for r in found["rows"]})
    console = Console(file=io.StringIO(), width=250)
    console.print(shown)
    (line,) = (
        line
        for line in console.file.getvalue().splitlines()
        if "sparse, heads 4/2, batch 2, context 1100" in line and "error" not in line
    )
    assert "25.0 (2.50×)" in line
    assert "0.21" in line  # 2 MiB in 10 µs
    assert "5%" in line


def test_the_figure_is_a_png_with_ours_and_the_peers(found, tmp_path):
    from benchmarks.kernels.figures import draw, series

    draw(found, tmp_path / "figure.png")
    image = (tmp_path / "figure.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 20_000
    lines = series(found, "4/2")
    assert set(lines) == {
        ("dense", "ours"),
        ("scores", "ours"),
        ("delta", "ours"),
        ("sparse", "ours"),
        ("dense", "a peer"),
        ("sparse", "a peer"),
    }
    assert set(lines["dense", "a peer"]) == {(2, 1100), (1, 40)}
    assert lines["dense", "a peer"][2, 1100][0] == 25.0


def test_without_rows_there_is_nothing_to_draw(found, tmp_path):
    from benchmarks.kernels.figures import draw

    with pytest.raises(ValueError, match="no attention rows"):
        draw({**found, "rows": []}, tmp_path / "figure.png")


@pytest.mark.parametrize("error", [ImportError("No module named 'matplotlib'"), OSError("full")])
def test_the_result_is_written_even_if_drawing_fails(found, tmp_path, monkeypatch, error):
    class Figures:
        def __getattr__(self, name):
            raise error

    monkeypatch.setitem(sys.modules, "benchmarks.kernels.figures", Figures())
    said = []
    write(found, tmp_path, "x", said.append, FIGURES)
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text()) == found
    assert path.name in said[0]
    assert str(error) in said[1]
    assert ("deltadecode[lab]" in said[1]) == isinstance(error, ImportError)


def test_the_figure_lies_beside_the_result(found, tmp_path):
    write(found, tmp_path, "x", lambda text: None, FIGURES)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.rpartition(".")[2] for name in names] == ["json", "png"]
    assert names[0].removesuffix("json") == names[1].removesuffix("png")


# The module's own command line


def test_the_module_needs_a_gpu_and_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels", "--quick"])
    with pytest.raises(SystemExit) as ended:
        launch(kernels)
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "needs a CUDA GPU" in error and error.count("error") == 1
    monkeypatch.setattr(sys, "argv", ["kernels", "--heads", "12-2"])
    with pytest.raises(SystemExit) as ended:
        launch(kernels)
    assert ended.value.code == 2
    assert "'12-2'" in capsys.readouterr().err


# On a GPU


@pytest.mark.gpu
def test_times_on_a_gpu_are_plausible_and_what_cannot_be_captured_still_runs():
    source = torch.zeros(2**26, device="cuda")
    target = torch.empty_like(source)
    timer = GraphTimer()
    copied = timer.prepare([lambda: target.copy_(source)], 2 * source.nbytes)
    waiting = timer.prepare([lambda: source[0].item()], 4)
    assert (copied.graph, waiting.graph) == (True, False)
    times = timer.measure({"copy": copied, "wait": waiting})
    assert 0.2e12 < 2 * source.nbytes / times["copy"].us * 1e6 < 20e12
    assert times["wait"].us > 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
