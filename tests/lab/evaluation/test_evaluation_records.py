"""Files of cells: what continues, what is forgiven, what is refused."""

import pytest

from deltadecode.errors import EvaluationError
from deltadecode.lab.evaluation.records import Records

SETTINGS = {"model": "m", "policy": "full", "seed": 3}


def record(seed, score=1.0):
    return {
        "seed": seed, "score": score, "tokens": 3, "read": 5.0, "full": 6, "kept": 3.0,
        "metadata": 0.0,
    }  # fmt: skip


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "new" / "cell.jsonl"
    Records.open(path, SETTINGS, {"commit": "c"}).add([record(3), record(4)])
    return path


def test_a_file_goes_on_where_it_stopped(file):
    again = Records.open(file, SETTINGS, {"commit": "other"})
    assert set(again.samples) == {3, 4}
    assert again.made_by == {"commit": "c"}
    again.add([record(5)])
    assert set(Records.read(file).samples) == {3, 4, 5}


def test_a_torn_last_line_is_cut_off(file):
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"seed": 5, "sco')
    again = Records.open(file, SETTINGS, {})
    assert set(again.samples) == {3, 4}
    assert file.read_bytes() == whole
    again.add([record(5)])
    assert set(Records.read(file).samples) == {3, 4, 5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace('"seed": 4', '"seed": 3', 1), "line 3 has seed 3 again"),
        (lambda t: t.replace('{"seed": 3, "sc', '{"seed": 3, "sc\n', 1), "line 2 is not a JSON"),
        (lambda t: t.replace('"read": 5.0, ', "", 1), "line 2 has no 'read'"),
        (lambda t: t.replace('"model": "m"', '"model": "n"', 1), "line 1 is no header"),
        (lambda t: t.replace('"format": 1', '"format": 9', 1), "has format 9"),
        (lambda t: '{"seed": 3}\n', "line 1 is no header"),
        (lambda t: "not JSON\n", "line 1 is not a JSON object"),
    ],
)
def test_a_broken_file_is_refused_and_left_alone(file, change, message):
    text = change(file.read_text())
    assert text != file.read_text()
    file.write_text(text)
    with pytest.raises(EvaluationError) as caught:
        Records.open(file, SETTINGS, {})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert file.read_text() == text


def test_a_foreign_file_is_refused_by_name(file):
    with pytest.raises(EvaluationError, match="its seed is 3, not 4; choose another --out"):
        Records.open(file, {**SETTINGS, "seed": 4}, {})
