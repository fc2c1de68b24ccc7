"""The CPU benchmark and its result file, on a tiny shape."""

import json
import re

import pytest
import torch

from benchmarks.cpu import run as cpu
from benchmarks.process_memory import peak_memory
from benchmarks.report import table
from deltadecode.lab.results import row, write_result
from deltadecode.lab.steptime import PLAN


@pytest.fixture(scope="module")
def small_result(tiny_shape):
    told = []
    found = cpu.run(
        tiny_shape,
        step_cases=((torch.float32, 1100, False), (torch.float32, 1100, True)),
        memory_cases=((torch.float32, 64),),
        steps=2,
        peaks=2,
        progress=lambda case, done: told.append((case, done)),
    )
    return found, told


def test_run_gives_a_complete_result(small_result):
    found, told = small_result
    assert set(found) == {"benchmark", "command", "commit", "machine", "versions", "rows"}
    assert found["benchmark"] == "cpu"
    assert found["command"] == "python -m benchmarks.cpu"
    step, covered, memory = found["rows"]
    for line in found["rows"]:
        assert {"case", "peer", "unit", "ours", "theirs", "ratio"} <= set(line)
        assert line["ratio"] == pytest.approx(line["theirs"] / line["ours"], rel=0.01)
    assert (step["unit"], memory["unit"]) == ("ms", "MiB")
    assert step["budget_pages"] == 64
    assert covered["budget_pages"] * 16 >= 1100
    assert memory["ours"] > 50
    assert memory["ours"] == pytest.approx(min(memory["runs_ours"]), rel=1e-4)
    assert memory["theirs"] == pytest.approx(min(memory["runs_theirs"]), rel=1e-4)
    assert len(memory["runs_ours"]) == len(memory["runs_theirs"]) == 2
    parts = [done for _, done in told]
    assert parts == sorted(parts)
    assert parts[-1] == pytest.approx(1.0)


def test_result_file_is_json_named_after_the_day_and_names_no_host(small_result, tmp_path):
    found, _ = small_result
    path = write_result(found, tmp_path / "results", "a-tag")
    assert re.fullmatch(r"cpu-\d{8}-a-tag\.json", path.name)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == found
    import platform

    assert platform.node() not in text
    assert str(tmp_path) not in text


def test_table_has_a_line_per_row(small_result):
    assert table(small_result[0]).row_count == 3


def test_ratio_is_theirs_by_ours():
    assert row("case", "peer", "ms", 10.0, 25.0)["ratio"] == 2.5


@pytest.mark.parametrize("tag", ["", "a b", "../up", "-x"])
def test_a_tag_that_is_no_file_name_is_refused(tag, tmp_path):
    with pytest.raises(ValueError, match=f"got {re.escape(repr(tag))}"):
        write_result({"benchmark": "cpu"}, tmp_path, tag)
    assert not list(tmp_path.iterdir())


def test_peak_memory_sees_the_cache(tiny_shape):
    sizes = [peak_memory("full", tiny_shape, n, torch.float32, PLAN) for n in (64, 8192)]
    # 20 layers, keys and values, 2 heads of 16 in float32.
    assert sizes[1] - sizes[0] > 0.8 * 20 * 2 * 8192 * 2 * 16 * 4 / 2**20


def test_a_failing_memory_process_is_reported_in_one_line(tiny_shape):
    plan_of_another_depth = type(PLAN)(delta_layers=(2, 30))
    with pytest.raises(RuntimeError, match=r"failed \(1\): .*got 30") as caught:
        peak_memory("delta", tiny_shape, 8, torch.float32, plan_of_another_depth)
    assert "\n" not in str(caught.value)
